//! DeepSeek-V3's gate: sigmoid scores, a bias that counts for selection only, top-k within the best
//! groups of experts, and the scores of the chosen, normalised and scaled, as weights.

use half::bf16;

use super::job::{Job, Routing};
use super::model::{Model, sigmoid};
use super::npy::{self, NpyError};
use super::parallel;

/// What the weights of a token sum to (`routed_scaling_factor`).
pub(crate) const SCALING_FACTOR: f64 = 2.5;
/// Groups of experts, where their number allows it (`n_group`).
const GROUPS: usize = 8;
/// A group's score is the sum of this many of its best.
const BEST_OF_GROUP: usize = 2;

/// Where the tokens of a rank go.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Routes {
    /// `[tokens, top_k]`; -1 is no expert.
    pub(crate) ids: Vec<i64>,
    /// `[tokens, top_k]`
    pub(crate) weights: Vec<f32>,
}

/// Why a recording cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum RoutingError {
    #[error("the recorded routing can no longer be read")]
    Recorded(#[from] NpyError),
    #[error("the recorded routing is now {shape:?}; it changed after the start")]
    Changed { shape: [usize; 3] },
    #[error(
        "the recorded routing sends token {token} of rank {rank} to expert {value}; ids are 0 to \
         {last}, and -1 for none: check --experts"
    )]
    Range {
        rank: usize,
        token: usize,
        value: i64,
        last: usize,
    },
    #[error("the recorded routing sends token {token} of rank {rank} to expert {value} twice")]
    Repeated {
        rank: usize,
        token: usize,
        value: i64,
    },
}

/// How the experts are grouped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Groups {
    /// Experts of a group.
    pub(crate) size: usize,
    /// Groups a token can choose from (`topk_group`).
    pub(crate) kept: usize,
}

impl Groups {
    /// DeepSeek-V3's 8 groups, 4 of them kept, or the nearest that `experts` and `top_k` allow.
    pub(crate) fn of(experts: usize, top_k: usize) -> Self {
        let groups = [GROUPS, 4, 2]
            .into_iter()
            .find(|&n| experts.is_multiple_of(n) && experts / n >= BEST_OF_GROUP)
            .unwrap_or(1);
        let size = experts / groups;
        Self {
            size,
            kept: groups.div_ceil(2).max(top_k.div_ceil(size)),
        }
    }
}

/// Routes the tokens `x` of `rank`.
pub(crate) fn route(
    job: &Job,
    model: &Model,
    rank: usize,
    x: &[bf16],
) -> Result<Routes, RoutingError> {
    let forced = forced(job, model, rank)?;
    let bias = model.selection_bias();
    let groups = Groups::of(job.experts, job.top_k);
    let rows: Vec<Vec<f64>> = (0..job.experts).map(|e| model.router_row(e)).collect();

    let mut routes = Routes {
        ids: vec![-1; job.tokens * job.top_k],
        weights: vec![0.0; job.tokens * job.top_k],
    };
    let tokens = x
        .chunks_exact(job.hidden)
        .zip(routes.ids.chunks_exact_mut(job.top_k))
        .zip(routes.weights.chunks_exact_mut(job.top_k))
        .enumerate()
        .collect();
    parallel::for_each(job.threads, tokens, |(token, ((x, ids), weights))| {
        let scores = scores(&rows, x);
        match &forced {
            Some(forced) => ids.copy_from_slice(&forced[token * job.top_k..][..job.top_k]),
            None => select(&scores, &bias, groups, ids),
        }
        weigh(&scores, ids, weights);
    });
    Ok(routes)
}

/// The ids that do not come from the gate, if so.
fn forced(job: &Job, model: &Model, rank: usize) -> Result<Option<Vec<i64>>, RoutingError> {
    match &job.routing {
        Routing::Uniform | Routing::Zipf | Routing::Hot => Ok(None),
        Routing::One => {
            let only = model.only_experts();
            Ok(Some(
                (0..job.tokens)
                    .flat_map(|_| only.iter().map(|&e| e as i64))
                    .collect(),
            ))
        }
        Routing::File(path) => {
            let array = npy::read(path)?;
            if array.shape != [job.ranks, job.tokens, job.top_k] {
                return Err(RoutingError::Changed { shape: array.shape });
            }
            let ids = array.matrix(rank);
            check(job, rank, ids)?;
            Ok(Some(ids.to_vec()))
        }
    }
}

/// Refuses ids of `rank` that the layer does not have, or that a token has twice.
pub(crate) fn check(job: &Job, rank: usize, ids: &[i64]) -> Result<(), RoutingError> {
    for (token, ids) in ids.chunks_exact(job.top_k).enumerate() {
        for (k, &value) in ids.iter().enumerate() {
            if value < -1 || value >= job.experts as i64 {
                return Err(RoutingError::Range {
                    rank,
                    token,
                    value,
                    last: job.experts - 1,
                });
            }
            if value >= 0 && ids[..k].contains(&value) {
                return Err(RoutingError::Repeated { rank, token, value });
            }
        }
    }
    Ok(())
}

fn scores(rows: &[Vec<f64>], x: &[bf16]) -> Vec<f64> {
    let x: Vec<f64> = x.iter().map(|&v| v.into()).collect();
    rows.iter().map(|row| sigmoid(dot(row, &x))).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a_main, a_rest) = a.as_chunks::<4>();
    let (b_main, b_rest) = b.as_chunks::<4>();
    let mut sums = [0.0; 4];
    for (a, b) in a_main.iter().zip(b_main) {
        for lane in 0..4 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

/// Chooses `ids.len()` experts of the best groups, best first; the lower index wins a tie.
fn select(scores: &[f64], bias: &[f64], groups: Groups, ids: &mut [i64]) {
    let biased: Vec<f64> = scores.iter().zip(bias).map(|(s, b)| s + b).collect();
    let group_scores: Vec<f64> = biased
        .chunks_exact(groups.size)
        .map(|group| {
            best(group, BEST_OF_GROUP)
                .into_iter()
                .map(|i| group[i])
                .sum()
        })
        .collect();
    let mut open = vec![f64::NEG_INFINITY; biased.len()];
    for group in best(&group_scores, groups.kept) {
        let experts = group * groups.size..(group + 1) * groups.size;
        open[experts.clone()].copy_from_slice(&biased[experts]);
    }
    let chosen = best(&open, ids.len());
    for (id, expert) in ids.iter_mut().zip(chosen) {
        *id = expert as i64;
    }
}

/// Indices of the `n` greatest values, greatest first.
pub(crate) fn best(values: &[f64], n: usize) -> Vec<usize> {
    let n = n.min(values.len());
    let mut order: Vec<usize> = (0..values.len()).collect();
    let descending = |&a: &usize, &b: &usize| values[b].total_cmp(&values[a]).then(a.cmp(&b));
    if n < order.len() {
        order.select_nth_unstable_by(n, descending);
        order.truncate(n);
    }
    order.sort_unstable_by(descending);
    order
}

/// Unbiased scores of the chosen, normalised and scaled; 0 for -1.
pub(crate) fn weigh(scores: &[f64], ids: &[i64], weights: &mut [f32]) {
    let score = |&id: &i64| usize::try_from(id).map_or(0.0, |expert| scores[expert]);
    let sum: f64 = ids.iter().map(score).sum();
    for (weight, id) in weights.iter_mut().zip(ids) {
        *weight = if *id < 0 {
            0.0
        } else {
            (score(id) / sum * SCALING_FACTOR) as f32
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::job::tests::small;

    fn route_all(job: &Job) -> Vec<Routes> {
        let model = Model::new(job);
        (0..job.ranks)
            .map(|rank| route(job, &model, rank, &model.tokens(rank)).unwrap())
            .collect()
    }

    /// Tokens per expert, the most popular first.
    fn loads(job: &Job) -> Vec<usize> {
        let mut loads = vec![0; job.experts];
        for id in route_all(job).iter().flat_map(|routes| &routes.ids) {
            loads[*id as usize] += 1;
        }
        loads.sort_unstable_by(|a, b| b.cmp(a));
        loads
    }

    fn wide(routing: Routing) -> Job {
        Job {
            tokens: 256,
            experts: 64,
            top_k: 8,
            routing,
            ..small()
        }
    }

    #[test]
    fn groups_are_those_of_deepseek_v3_where_they_fit() {
        assert_eq!(Groups::of(256, 8), Groups { size: 32, kept: 4 });
        assert_eq!(Groups::of(64, 8), Groups { size: 8, kept: 4 });
        assert_eq!(Groups::of(8, 8), Groups { size: 2, kept: 4 });
        assert_eq!(Groups::of(16, 16), Groups { size: 2, kept: 8 });
        assert_eq!(Groups::of(12, 3), Groups { size: 3, kept: 2 });
        assert_eq!(Groups::of(7, 7), Groups { size: 7, kept: 1 });
        assert_eq!(Groups::of(1, 1), Groups { size: 1, kept: 1 });
    }

    #[test]
    fn selection_is_biased_grouped_and_ordered() {
        // Group 0 has the two best, group 1 the best sum after the bias, group 2 is out.
        let scores = [0.9, 0.1, 0.8, 0.2, 0.6, 0.5, 0.7, 0.7];
        let bias = [0.0, 0.0, 0.0, 0.5, 0.0, 0.0, -0.5, 0.0];
        let mut ids = [0; 3];
        select(&scores, &bias, Groups { size: 2, kept: 2 }, &mut ids);
        // Sums: 1.0, 1.5, 1.1, 0.9.
        assert_eq!(ids, [2, 3, 4]);
        let mut weights = [0.0; 3];
        weigh(&scores, &ids, &mut weights);
        // The weights are of the unbiased scores 0.8, 0.2, 0.6.
        for (weight, expected) in weights.iter().zip([1.25, 0.3125, 0.9375]) {
            assert!((weight - expected).abs() < 1e-6, "{weights:?}");
        }
    }

    #[test]
    fn no_expert_has_no_weight() {
        let mut weights = [1.0; 3];
        weigh(&[0.5, 0.25], &[-1, 1, -1], &mut weights);
        assert_eq!(weights, [0.0, 2.5, 0.0]);
        weigh(&[0.5, 0.25], &[-1, -1, -1], &mut weights);
        assert_eq!(weights, [0.0, 0.0, 0.0]);
    }

    #[test]
    fn every_routing_gives_distinct_experts_and_weights_that_sum_to_the_factor() {
        for routing in [Routing::Uniform, Routing::Zipf, Routing::Hot, Routing::One] {
            let job = Job {
                experts: 16,
                top_k: 5,
                ..wide(routing)
            };
            let routes = route_all(&job);
            assert_eq!(
                routes,
                route_all(&Job {
                    threads: 1,
                    ..job.clone()
                })
            );
            for routes in routes {
                check(&job, 0, &routes.ids).unwrap();
                assert!(routes.ids.iter().all(|&id| id >= 0));
                for weights in routes.weights.chunks_exact(5) {
                    let sum: f32 = weights.iter().sum();
                    assert!((sum - 2.5).abs() < 1e-5, "{sum}");
                }
            }
        }
    }

    #[test]
    fn uniform_is_near_uniform() {
        let loads = loads(&wide(Routing::Uniform));
        // 64 each on average.
        assert!(loads[0] < 64 * 2 && loads[63] > 64 / 3, "{loads:?}");
    }

    #[test]
    fn zipf_falls_with_the_place() {
        let loads = loads(&wide(Routing::Zipf));
        // The first are chosen by nearly all of 512 tokens; from there on half as often at twice
        // the place, about.
        assert!(loads[0] > 400, "{loads:?}");
        for (place, from, to) in [(4, 1.3, 3.5), (8, 1.3, 3.5), (16, 1.3, 3.5)] {
            let ratio = loads[place - 1] as f64 / loads[2 * place - 1] as f64;
            assert!((from..to).contains(&ratio), "{place}: {ratio} {loads:?}");
        }
    }

    #[test]
    fn hot_experts_get_most() {
        let loads = loads(&wide(Routing::Hot));
        let hot: usize = loads[..8].iter().sum();
        let all: usize = loads.iter().sum();
        assert!(
            hot * 10 > all * 6 && hot * 10 < all * 9,
            "{hot} of {all}: {loads:?}"
        );
    }

    #[test]
    fn one_sends_every_token_to_the_same_experts() {
        let loads = loads(&wide(Routing::One));
        assert_eq!(loads[..8], [512; 8]);
        assert_eq!(loads[8..], [0; 56]);
    }

    #[test]
    fn a_recording_is_checked() {
        let job = small();
        let ids = |bad: i64| vec![0, 1, -1, 7, -1, -1, 2, bad, 3];
        assert!(check(&job, 1, &ids(4)).is_ok());
        assert!(matches!(
            check(&job, 1, &ids(8)),
            Err(RoutingError::Range {
                rank: 1,
                token: 2,
                value: 8,
                last: 7
            })
        ));
        assert!(matches!(
            check(&job, 1, &ids(-2)),
            Err(RoutingError::Range { value: -2, .. })
        ));
        assert!(matches!(
            check(&job, 1, &ids(2)),
            Err(RoutingError::Repeated {
                rank: 1,
                token: 2,
                value: 2
            })
        ));
    }
}
