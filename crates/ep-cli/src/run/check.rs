//! Whether the layer's output is the reference's.

use half::bf16;
use serde::{Deserialize, Serialize};

use crate::layer::Dtype;

impl Dtype {
    /// Bound on the relative error `‖output - reference‖ / ‖reference‖` of all tokens.
    ///
    /// A rounding to a significand of `b` bits moves a value by at most 2⁻ᵇ of itself, and a vector
    /// by at most 2⁻ᵇ/√3 in the mean.
    ///
    /// BF16 (`b` = 8): gate, up, their product, the expert's output, a rank's partial sum and the
    /// result are rounded, independently of each other; gate and up count by the slope of SiLU,
    /// about 2 together. √(2 + 4) · 2⁻⁸/√3 is 0.0055; the bound is 2⁻⁷.
    ///
    /// FP8 (E4M3, `b` = 4): the token's rounding reaches gate and up and hides all others.
    /// √2 · 2⁻⁴/√3 is 0.051; the bound is 2⁻⁴.
    pub(crate) fn tolerance(self) -> f64 {
        match self {
            Self::Bf16 => 1.0 / 128.0,
            Self::Fp8 => 1.0 / 16.0,
        }
    }
}

/// A token has fewer channels to average over than the whole output: its own error may be this many
/// tolerances. An expert left out of a token's sum is about 1/√top-k, far above.
const TOKEN_FACTOR: f64 = 2.0;

/// How far an output is from the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Comparison {
    error_square: f64,
    reference_square: f64,
    /// Relative error of the worst token.
    pub(crate) worst_token: f64,
    /// Values that are wrong at any tolerance: not finite (the poison that outputs are filled with
    /// first is NaN), or not zero in a token without experts.
    pub(crate) wrong: usize,
}

impl Comparison {
    /// Compares `[tokens, hidden]`.
    pub(crate) fn of(output: &[bf16], reference: &[f64], hidden: usize) -> Self {
        let missing = reference.len().abs_diff(output.len());
        output
            .chunks(hidden)
            .zip(reference.chunks(hidden))
            .map(|(output, reference)| Self::of_token(output, reference))
            .fold(
                Self {
                    wrong: missing,
                    ..Self::default()
                },
                Self::and,
            )
    }

    fn of_token(output: &[bf16], reference: &[f64]) -> Self {
        let reference_square: f64 = reference.iter().map(|v| v * v).sum();
        if reference_square == 0.0 {
            let wrong = output.iter().filter(|v| v.to_f64() != 0.0).count();
            return Self {
                wrong,
                ..Self::default()
            };
        }
        let mut token = Self {
            reference_square,
            ..Self::default()
        };
        for (output, reference) in output.iter().zip(reference) {
            if output.is_finite() {
                token.error_square += (output.to_f64() - reference).powi(2);
            } else {
                token.wrong += 1;
            }
        }
        token.worst_token = token.relative_error();
        token
    }

    /// Both together.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            error_square: self.error_square + other.error_square,
            reference_square: self.reference_square + other.reference_square,
            worst_token: self.worst_token.max(other.worst_token),
            wrong: self.wrong + other.wrong,
        }
    }

    /// `‖output - reference‖ / ‖reference‖` over the values that are not [`wrong`](Self::wrong).
    pub(crate) fn relative_error(&self) -> f64 {
        if self.reference_square == 0.0 {
            return 0.0;
        }
        (self.error_square / self.reference_square).sqrt()
    }

    /// Whether the output is right.
    pub(crate) fn within(&self, tolerance: f64) -> bool {
        self.wrong == 0
            && self.relative_error() <= tolerance
            && self.worst_token <= TOKEN_FACTOR * tolerance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HIDDEN: usize = 4;
    const REFERENCE: [f64; 8] = [1.0, -2.0, 3.0, -4.0, 0.0, 0.0, 0.0, 0.0];

    fn output() -> Vec<bf16> {
        REFERENCE.iter().map(|&v| bf16::from_f64(v)).collect()
    }

    #[test]
    fn equal_is_right() {
        let comparison = Comparison::of(&output(), &REFERENCE, HIDDEN);
        assert_eq!(comparison.relative_error(), 0.0);
        assert!(comparison.within(0.0));
        assert!(Comparison::of(&[], &[], HIDDEN).within(0.0));
    }

    #[test]
    fn the_error_is_relative_to_the_norm() {
        let mut output = output();
        output[3] = bf16::from_f64(-4.5);
        let comparison = Comparison::of(&output, &REFERENCE, HIDDEN);
        let expected = 0.5 / 30.0_f64.sqrt();
        assert!((comparison.relative_error() - expected).abs() < 1e-12);
        assert!(comparison.within(0.1) && !comparison.within(0.09));
    }

    #[test]
    fn one_bad_token_among_many_good_ones_is_wrong() {
        let reference: Vec<f64> = (0..4000).map(|i| 1.0 + f64::from(i % 3)).collect();
        let mut output: Vec<bf16> = reference.iter().map(|&v| bf16::from_f64(v)).collect();
        output[1002] = bf16::ZERO;
        let comparison = Comparison::of(&output, &reference, 100);
        assert!(comparison.relative_error() < 0.01);
        assert!(!comparison.within(0.02), "{comparison:?}");
    }

    #[test]
    fn poison_is_wrong_at_any_tolerance() {
        for poison in [bf16::NAN, bf16::from_bits(0x7fc0), bf16::INFINITY] {
            for at in [0, 5] {
                let mut output = output();
                output[at] = poison;
                let comparison = Comparison::of(&output, &REFERENCE, HIDDEN);
                assert_eq!(comparison.wrong, 1);
                assert!(!comparison.within(f64::MAX));
            }
        }
    }

    #[test]
    fn tokens_without_experts_are_zero_and_none_is_left_out() {
        let mut touched = output();
        touched[6] = bf16::from_f64(1e-6);
        assert_eq!(Comparison::of(&touched, &REFERENCE, HIDDEN).wrong, 1);
        assert_eq!(Comparison::of(&output()[..4], &REFERENCE, HIDDEN).wrong, 4);
    }
}
