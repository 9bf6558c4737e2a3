//! What a run ends with.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::check::Comparison;
use crate::layer::Job;
use crate::session::{Facts, Times};
use crate::statistics::{quantile, rounded, slowest};

/// What one rank found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) facts: Facts,
    pub(crate) comparison: Comparison,
    /// Whether the layer gave the same bits before and after the timed calls.
    pub(crate) repeatable: bool,
    pub(crate) times: Times,
}

/// The line that `--json` prints.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Report {
    job: &'static str,
    backend: String,
    alloc: String,
    ranks: usize,
    tokens: usize,
    hidden: usize,
    experts: usize,
    top_k: usize,
    dtype: String,
    /// Median over the timed calls of the slowest rank; absent without timed calls.
    dispatch_us: Option<f64>,
    combine_us: Option<f64>,
    rel_err: f64,
    tolerance: f64,
    verified: bool,
    /// Relative error of the worst token.
    token_err: f64,
    /// Values that were never written, not finite, or not zero where nothing was routed.
    wrong: usize,
    repeatable: bool,
    symmetric_bytes: u64,
    intermediate: usize,
    routing: String,
    seed: u64,
    iters: usize,
}

impl Report {
    /// Sums up what the ranks found.
    pub(crate) fn new(job: &Job, outcomes: &[Outcome]) -> Self {
        let comparison = outcomes
            .iter()
            .map(|o| o.comparison)
            .fold(Comparison::default(), Comparison::and);
        let repeatable = outcomes.iter().all(|o| o.repeatable);
        let tolerance = job.dtype.tolerance();
        let facts = outcomes.first().map(|o| &o.facts);
        Self {
            job: "moe-layer",
            backend: facts.map_or_else(String::new, |f| f.backend.clone()),
            alloc: facts.map_or_else(String::new, |f| f.alloc.clone()),
            ranks: job.ranks,
            tokens: job.tokens,
            hidden: job.hidden,
            experts: job.experts,
            top_k: job.top_k,
            dtype: job.dtype.to_string(),
            dispatch_us: median(outcomes, |times| &times.dispatch_us),
            combine_us: median(outcomes, |times| &times.combine_us),
            rel_err: comparison.relative_error(),
            tolerance,
            verified: outcomes.len() == job.ranks && repeatable && comparison.within(tolerance),
            token_err: comparison.worst_token,
            wrong: comparison.wrong,
            repeatable,
            symmetric_bytes: outcomes
                .iter()
                .map(|o| o.facts.symmetric_bytes)
                .max()
                .unwrap_or(0),
            intermediate: job.intermediate,
            routing: job.routing.to_string(),
            seed: job.seed,
            iters: job.iters,
        }
    }

    pub(crate) fn verified(&self) -> bool {
        self.verified
    }
}

/// The median over calls of the slowest rank.
fn median(outcomes: &[Outcome], times: fn(&Times) -> &Vec<f64>) -> Option<f64> {
    let median = quantile(&slowest(outcomes.iter().map(|o| times(&o.times))), 0.5);
    (!median.is_nan()).then(|| rounded(median))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} ranks on {} (memory: {}, {:.2} MB symmetric a rank)",
            self.ranks,
            self.backend,
            self.alloc,
            self.symmetric_bytes as f64 / 1e6
        )?;
        writeln!(
            f,
            "{} tokens a rank of {} {} channels, {} experts, top-{}, routing {}",
            self.tokens, self.hidden, self.dtype, self.experts, self.top_k, self.routing
        )?;
        if let (Some(dispatch), Some(combine)) = (self.dispatch_us, self.combine_us) {
            writeln!(
                f,
                "dispatch {dispatch} µs, combine {combine} µs (median of {}, slowest rank)",
                self.iters
            )?;
        }
        let verdict = if self.verified {
            "verified"
        } else {
            "NOT VERIFIED"
        };
        write!(
            f,
            "{verdict}: relative error {:.2e} (worst token {:.2e}), tolerance {:.2e}",
            self.rel_err, self.token_err, self.tolerance
        )?;
        if self.wrong > 0 {
            write!(
                f,
                "; {} values unwritten, not finite, or not zero as they must",
                self.wrong
            )?;
        }
        if !self.repeatable {
            write!(f, "; the same input gave other bits the second time")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::layer::job::tests::small;

    fn outcome(dispatch_us: &[f64], combine_us: &[f64]) -> Outcome {
        Outcome {
            facts: Facts {
                backend: "sim".to_owned(),
                alloc: "malloc".to_owned(),
                plan: "malloc: all ranks on one host".to_owned(),
                symmetric_bytes: 4096,
            },
            comparison: Comparison::of(&[bf16::ONE], &[1.001], 1),
            repeatable: true,
            times: Times {
                dispatch_us: dispatch_us.into(),
                combine_us: combine_us.into(),
            },
        }
    }

    #[test]
    fn the_line_is_that_of_the_job_and_its_keys_are_in_order() {
        let outcomes = [
            outcome(&[1.0, 9.0, 3.0], &[5.0, 5.0]),
            outcome(&[2.0, 2.0, 2.0], &[4.0, 7.0]),
        ];
        let line = serde_json::to_string(&Report::new(&small(), &outcomes)).unwrap();
        let start = r#"{"job":"moe-layer","backend":"sim","alloc":"malloc","ranks":2,"tokens":6,"hidden":128,"experts":8,"top_k":3,"dtype":"bf16","dispatch_us":3.0,"combine_us":5.0,"rel_err":0.000999"#;
        assert!(line.starts_with(start), "{line}");
        assert!(
            line.contains(r#","tolerance":0.0078125,"verified":true,"#),
            "{line}"
        );
        assert!(line.contains(r#""symmetric_bytes":4096"#), "{line}");
    }

    #[test]
    fn without_timed_calls_there_are_no_times() {
        let report = Report::new(&small(), &[outcome(&[], &[]), outcome(&[], &[])]);
        assert_eq!((report.dispatch_us, report.combine_us), (None, None));
        assert!(report.verified());
    }

    #[test]
    fn nothing_is_verified_by_a_missing_a_wrong_or_an_unrepeatable_rank() {
        let good = outcome(&[], &[]);
        assert!(!Report::new(&small(), std::slice::from_ref(&good)).verified());
        let wrong = Outcome {
            comparison: Comparison::of(&[bf16::NAN], &[1.0], 1),
            ..good.clone()
        };
        assert!(!Report::new(&small(), &[good.clone(), wrong]).verified());
        let other = Outcome {
            repeatable: false,
            ..good.clone()
        };
        let report = Report::new(&small(), &[good, other]);
        assert!(!report.verified());
        assert!(report.to_string().contains("NOT VERIFIED"));
    }

    #[test]
    fn outcomes_survive_the_way_between_processes() {
        // Of values that every parser reads to the last bit.
        let comparison = Comparison::of(&[bf16::ONE], &[1.5], 1);
        let outcome = Outcome {
            comparison,
            ..outcome(&[1.25, 0.5], &[3.5])
        };
        let line = serde_json::to_string(&outcome).unwrap();
        assert_eq!(serde_json::from_str::<Outcome>(&line).unwrap(), outcome);
    }
}
