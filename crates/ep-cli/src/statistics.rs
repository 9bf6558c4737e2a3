//! Times of calls, summed up.

/// Per call the slowest rank, ascending.
pub(crate) fn slowest<'a>(ranks: impl Iterator<Item = &'a Vec<f64>>) -> Vec<f64> {
    let ranks: Vec<&Vec<f64>> = ranks.collect();
    let calls = ranks.iter().map(|times| times.len()).min().unwrap_or(0);
    let mut slowest: Vec<f64> = (0..calls)
        .map(|call| ranks.iter().map(|times| times[call]).fold(0.0, f64::max))
        .collect();
    slowest.sort_by(f64::total_cmp);
    slowest
}

/// The value that a part `q` of ascending values does not exceed; NaN without values.
pub(crate) fn quantile(ascending: &[f64], q: f64) -> f64 {
    let index = (q * ascending.len() as f64).ceil() as usize;
    ascending
        .get(index.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

/// In steps of 10 ns.
pub(crate) fn rounded(us: f64) -> f64 {
    (us * 100.0).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_occurred() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(quantile(&values, 0.5), 100.0);
        assert_eq!(quantile(&values, 0.99), 198.0);
        assert_eq!(quantile(&[3.0], 0.99), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn a_call_takes_as_long_as_on_the_slowest_rank() {
        let ranks = [vec![1.0, 9.0, 3.0], vec![2.0, 2.0]];
        assert_eq!(slowest(ranks.iter()), [2.0, 9.0]);
    }
}
