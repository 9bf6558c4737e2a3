//! Where tokens go.
//!
//! Unlike those of `ep run`, the experts of a token are not confined to groups of experts: a uniform
//! routing takes every set of experts alike, as other libraries' benchmarks do. With groups a token
//! would go to fewer ranks.

use crate::layer::model::sigmoid;
use crate::layer::random::Stream;
use crate::layer::router::{best, weigh};
use crate::layer::{Job, Model, Routes, Routing};

/// The name of the scores' stream, which is none of the model's.
const SCORES: u64 = 16;

/// Routes the tokens of `rank`: of random scores, biased as the routing says, the best.
pub(super) fn routes(job: &Job, model: &Model, rank: usize) -> Routes {
    let stream = Stream::new(job.seed).child(SCORES).child(rank as u64);
    let bias = match job.routing {
        Routing::Uniform => vec![0.0; job.experts],
        _ => model.selection_bias(),
    };
    let only = match job.routing {
        Routing::One => Some(model.only_experts()),
        _ => None,
    };
    let mut routes = Routes {
        ids: vec![-1; job.tokens * job.top_k],
        weights: vec![0.0; job.tokens * job.top_k],
    };
    let tokens = routes
        .ids
        .chunks_exact_mut(job.top_k)
        .zip(routes.weights.chunks_exact_mut(job.top_k));
    for (token, (ids, weights)) in tokens.enumerate() {
        let score = |expert| sigmoid(stream.normal((token * job.experts + expert) as u64));
        let scores: Vec<f64> = (0..job.experts).map(score).collect();
        let chosen = only.clone().unwrap_or_else(|| {
            let biased: Vec<f64> = scores.iter().zip(&bias).map(|(s, b)| s + b).collect();
            best(&biased, job.top_k)
        });
        for (id, expert) in ids.iter_mut().zip(chosen) {
            *id = expert as i64;
        }
        weigh(&scores, ids, weights);
    }
    routes
}

/// How many tokens go to each rank.
pub(super) fn rows(job: &Job, ids: &[i64]) -> Vec<usize> {
    let mut rows = vec![0; job.ranks];
    for ids in ids.chunks_exact(job.top_k) {
        for (rank, rows) in rows.iter_mut().enumerate() {
            let experts = rank * job.local_experts()..(rank + 1) * job.local_experts();
            let comes = |&id: &i64| usize::try_from(id).is_ok_and(|id| experts.contains(&id));
            *rows += usize::from(ids.iter().any(comes));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perf::args::tests::parse;

    fn routed(line: &str, rank: usize) -> (Job, Routes) {
        let job = parse(line).sweep().unwrap().job;
        let routes = routes(&job, &Model::new(&job), rank);
        (job, routes)
    }

    #[test]
    fn a_row_goes_to_a_rank_once() {
        let job = parse("--ranks 2 --experts 8 --top-k 3")
            .sweep()
            .unwrap()
            .job;
        let ids = [0, 1, 3, 0, 4, -1, -1, -1, -1, 7, 6, 5];
        assert_eq!(rows(&job, &ids), [2, 2]);
    }

    #[test]
    fn uniform_routing_goes_to_as_many_ranks_as_chance_does() {
        let (job, routes) = routed("--tokens 512", 0);
        let sent: usize = rows(&job, &routes.ids).iter().sum();
        // A rank has one of the 8 experts with 1 - (3/4)^8 = 0.9, so that 4 ranks take 3.6 copies.
        let copies = sent as f64 / 512.0;
        assert!((copies - 3.6).abs() < 0.1, "{copies}");
    }

    #[test]
    fn every_routing_takes_distinct_experts_with_weights() {
        for routing in ["uniform", "zipf", "hot", "one"] {
            let line = format!("--tokens 16 --routing {routing}");
            let (job, routes) = routed(&line, 0);
            for (ids, weights) in routes.ids.chunks(8).zip(routes.weights.chunks(8)) {
                let mut ids = ids.to_vec();
                ids.sort_unstable();
                ids.dedup();
                assert_eq!(ids.len(), 8, "{routing}");
                assert!(ids[0] >= 0 && ids[7] < job.experts as i64, "{routing}");
                assert!(weights.iter().all(|&weight| weight > 0.0), "{routing}");
            }
            let (_, other) = routed(&line, 1);
            assert_eq!(other.ids == routes.ids, routing == "one");
        }
    }

    #[test]
    fn skewed_routings_load_one_expert_more_than_uniform_does() {
        let most = |routing| {
            let (job, routes) = routed(&format!("--tokens 128 --routing {routing}"), 0);
            let mut loads = vec![0; job.experts];
            for id in routes.ids {
                loads[id as usize] += 1;
            }
            loads.into_iter().max().unwrap()
        };
        assert!(most("uniform") < 20);
        assert!(most("zipf") > 60);
        assert!(most("hot") > 60);
        assert_eq!(most("one"), 128);
    }
}
