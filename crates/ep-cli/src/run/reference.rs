//! The layer once more, in float64 and straight from its definition: gate, experts and sum over a
//! token's experts, with nothing of the code under test and no ranks.

use std::sync::{Mutex, PoisonError};

use half::bf16;

use super::dense;
use crate::layer::job::{Job, Routing};
use crate::layer::model::{Experts, Matrix, Model, sigmoid};
use crate::layer::parallel;
use crate::layer::router::{Groups, Routes, SCALING_FACTOR};

/// The router and this module's own gate disagree.
#[derive(Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum GateError {
    #[error("token {token} was routed to {routed:?}; the reference's gate says {expected:?}")]
    Experts {
        token: usize,
        routed: Vec<i64>,
        expected: Vec<i64>,
    },
    #[error(
        "token {token} was given the weights {given:?}; the reference's gate says {expected:?}"
    )]
    Weights {
        token: usize,
        given: Vec<f32>,
        expected: Vec<f64>,
    },
}

/// Rows of weights that are made at a time: two for each channel inside the expert, one of the
/// output.
const BLOCK: usize = 32;

/// The layer's output for the tokens `x`, `[tokens, hidden]`, after checking where the router sent
/// them.
pub(crate) fn layer(
    job: &Job,
    model: &Model,
    x: &[bf16],
    routes: &Routes,
) -> Result<Vec<f64>, GateError> {
    let x: Vec<f64> = x.iter().map(|&v| v.into()).collect();
    let x: Vec<&[f64]> = x.chunks_exact(job.hidden).collect();
    let weights = gate(job, model, &x, routes)?;
    let visits = visits(job, routes, &weights);
    let experts = model.experts();
    let activated = activate(job, &experts, &x, &visits);
    Ok(project(job, &experts, &activated, &visits))
}

/// The tokens that go to an expert.
struct Visits {
    expert: usize,
    /// Token and weight.
    tokens: Vec<(usize, f64)>,
}

fn visits(job: &Job, routes: &Routes, weights: &[f64]) -> Vec<Visits> {
    let mut tokens = vec![Vec::new(); job.experts];
    for (entry, (&id, &weight)) in routes.ids.iter().zip(weights).enumerate() {
        if let Ok(expert) = usize::try_from(id) {
            tokens[expert].push((entry / job.top_k, weight));
        }
    }
    tokens
        .into_iter()
        .enumerate()
        .filter(|(_, tokens)| !tokens.is_empty())
        .map(|(expert, tokens)| Visits { expert, tokens })
        .collect()
}

/// The weights, `[tokens, top_k]`.
fn gate(job: &Job, model: &Model, x: &[&[f64]], routes: &Routes) -> Result<Vec<f64>, GateError> {
    let bias = model.selection_bias();
    let groups = Groups::of(job.experts, job.top_k);
    let failure = Mutex::new(None);
    let mut weights = vec![0.0; x.len() * job.top_k];
    let share = x.len().div_ceil(job.threads).max(1);
    let parts = x
        .chunks(share)
        .zip(weights.chunks_mut(share * job.top_k))
        .enumerate()
        .collect();
    parallel::for_each(job.threads, parts, |(part, (x, weights))| {
        let logits = dense::product(job.experts, job.hidden, x, |row, column, out| {
            model.fill_router_row(row, column, out);
        });
        let rows = logits
            .chunks_exact(job.experts)
            .zip(weights.chunks_exact_mut(job.top_k));
        for (i, (logits, weights)) in rows.enumerate() {
            let token = part * share + i;
            let entries = token * job.top_k..(token + 1) * job.top_k;
            let (ids, given) = (&routes.ids[entries.clone()], &routes.weights[entries]);
            let scores: Vec<f64> = logits.iter().map(|&logit| sigmoid(logit)).collect();
            if let Err(error) = judge(job, groups, &scores, &bias, token, ids, given, weights) {
                *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return;
            }
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(weights),
    }
}

/// Compares one token's routes with what the gate says, and writes its weights.
#[expect(
    clippy::too_many_arguments,
    reason = "one token's view of everything the gate knows"
)]
fn judge(
    job: &Job,
    groups: Groups,
    scores: &[f64],
    bias: &[f64],
    token: usize,
    ids: &[i64],
    given: &[f32],
    weights: &mut [f64],
) -> Result<(), GateError> {
    if matches!(job.routing, Routing::Uniform | Routing::Zipf | Routing::Hot) {
        let expected = choose(scores, bias, groups, job.top_k);
        if ids != expected {
            return Err(GateError::Experts {
                token,
                routed: ids.to_vec(),
                expected,
            });
        }
    }
    let chosen = |id: i64| if id < 0 { 0.0 } else { scores[id as usize] };
    let sum: f64 = ids.iter().map(|&id| chosen(id)).sum();
    let mut agree = true;
    for ((weight, &id), &given) in weights.iter_mut().zip(ids).zip(given) {
        *weight = if id < 0 {
            0.0
        } else {
            SCALING_FACTOR * chosen(id) / sum
        };
        agree &= (*weight - f64::from(given)).abs() <= 1e-6;
    }
    if agree {
        Ok(())
    } else {
        Err(GateError::Weights {
            token,
            given: given.to_vec(),
            expected: weights.to_vec(),
        })
    }
}

/// The chosen experts: everything sorted, as the definition reads.
fn choose(scores: &[f64], bias: &[f64], groups: Groups, top_k: usize) -> Vec<i64> {
    let value = |expert: usize| scores[expert] + bias[expert];
    let mut ranking: Vec<(f64, Vec<usize>)> = (0..scores.len() / groups.size)
        .map(|group| {
            let mut members: Vec<usize> =
                (group * groups.size..(group + 1) * groups.size).collect();
            members.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
            (members.iter().take(2).map(|&e| value(e)).sum(), members)
        })
        .collect();
    ranking.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut open: Vec<usize> = ranking
        .into_iter()
        .take(groups.kept)
        .flat_map(|(_, members)| members)
        .collect();
    open.sort_unstable();
    open.sort_by(|&a, &b| value(b).total_cmp(&value(a)));
    open.into_iter()
        .take(top_k)
        .map(|expert| expert as i64)
        .collect()
}

/// `silu(gate · x) * (up · x)` of every visit, per expert `[tokens, intermediate]`.
fn activate(job: &Job, experts: &Experts<f64>, x: &[&[f64]], visits: &[Visits]) -> Vec<Vec<f64>> {
    let width = job.intermediate;
    let activated: Vec<Mutex<Vec<f64>>> = visits
        .iter()
        .map(|v| Mutex::new(vec![0.0; v.tokens.len() * width]))
        .collect();
    let parts = visits
        .iter()
        .zip(&activated)
        .flat_map(|pair| (0..width).step_by(BLOCK).map(move |begin| (pair, begin)))
        .collect();
    parallel::for_each(job.threads, parts, |((visits, activated), begin)| {
        let rows = BLOCK.min(width - begin);
        let tokens: Vec<&[f64]> = visits.tokens.iter().map(|&(token, _)| x[token]).collect();
        // Rows alternate between gate and up.
        let both = dense::product(2 * rows, job.hidden, &tokens, |row, column, out| {
            let matrix = if row % 2 == 0 {
                Matrix::Gate
            } else {
                Matrix::Up
            };
            experts.fill(visits.expert, matrix, begin + row / 2, column, out);
        });
        let mut activated = activated.lock().unwrap_or_else(PoisonError::into_inner);
        for (out, both) in activated
            .chunks_exact_mut(width)
            .zip(both.chunks_exact(2 * rows))
        {
            for (out, &[gate, up]) in out[begin..].iter_mut().zip(both.as_chunks().0) {
                *out = gate * sigmoid(gate) * up;
            }
        }
    });
    activated
        .into_iter()
        .map(|m| m.into_inner().unwrap_or_else(PoisonError::into_inner))
        .collect()
}

/// The sum over a token's experts of `weight * down · activated`, `[tokens, hidden]`.
fn project(
    job: &Job,
    experts: &Experts<f64>,
    activated: &[Vec<f64>],
    visits: &[Visits],
) -> Vec<f64> {
    let out = Mutex::new(vec![0.0; job.tokens * job.hidden]);
    let parts = (0..job.hidden).step_by(2 * BLOCK).collect();
    parallel::for_each(job.threads, parts, |begin| {
        let rows = (2 * BLOCK).min(job.hidden - begin);
        let mut sums = vec![0.0; job.tokens * rows];
        for (visits, activated) in visits.iter().zip(activated) {
            let tokens: Vec<&[f64]> = activated.chunks_exact(job.intermediate).collect();
            let y = dense::product(rows, job.intermediate, &tokens, |row, column, out| {
                experts.fill(visits.expert, Matrix::Down, begin + row, column, out);
            });
            for (&(token, weight), y) in visits.tokens.iter().zip(y.chunks_exact(rows)) {
                for (sum, y) in sums[token * rows..(token + 1) * rows].iter_mut().zip(y) {
                    *sum += weight * y;
                }
            }
        }
        let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
        for (out, sums) in out
            .chunks_exact_mut(job.hidden)
            .zip(sums.chunks_exact(rows))
        {
            out[begin..begin + rows].copy_from_slice(sums);
        }
    });
    out.into_inner().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::job::tests::small;
    use crate::layer::router;

    /// The layer for one token, without blocks or threads.
    fn naive(job: &Job, x: &[bf16], ids: &[i64], weights: &[f32]) -> Vec<f64> {
        let experts = Model::new(job).experts::<f64>();
        let row = |expert, matrix, row, length| {
            let mut values = vec![0.0; length];
            experts.fill(expert, matrix, row, 0, &mut values);
            values
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let x: Vec<f64> = x.iter().map(|v| v.to_f64()).collect();
        let mut out = vec![0.0; job.hidden];
        for (&id, &weight) in ids.iter().zip(weights) {
            let Ok(expert) = usize::try_from(id) else {
                continue;
            };
            let activated: Vec<f64> = (0..job.intermediate)
                .map(|i| {
                    let gate = dot(&row(expert, Matrix::Gate, i, job.hidden), &x);
                    let up = dot(&row(expert, Matrix::Up, i, job.hidden), &x);
                    gate / (1.0 + (-gate).exp()) * up
                })
                .collect();
            for (h, out) in out.iter_mut().enumerate() {
                let down = row(expert, Matrix::Down, h, job.intermediate);
                *out += f64::from(weight) * dot(&down, &activated);
            }
        }
        out
    }

    #[test]
    fn blocks_and_threads_change_nothing() {
        for routing in [Routing::Uniform, Routing::Zipf, Routing::Hot, Routing::One] {
            let job = Job {
                hidden: 640,
                intermediate: 72,
                threads: 3,
                routing,
                ..small()
            };
            let model = Model::new(&job);
            let x = model.tokens(1);
            let routes = router::route(&job, &model, 1, &x).unwrap();
            let out = layer(&job, &model, &x, &routes).unwrap();
            for (token, out) in out.chunks_exact(job.hidden).enumerate() {
                let entries = token * job.top_k..(token + 1) * job.top_k;
                let expected = naive(
                    &job,
                    &x[token * job.hidden..(token + 1) * job.hidden],
                    &routes.ids[entries.clone()],
                    &routes.weights[entries],
                );
                for (out, expected) in out.iter().zip(expected) {
                    // The weights of the routes are rounded to float32.
                    assert!((out - expected).abs() < 1e-5, "{out} {expected}");
                }
            }
            assert_eq!(
                out,
                layer(&Job { threads: 1, ..job }, &model, &x, &routes).unwrap()
            );
        }
    }

    #[test]
    fn tokens_without_experts_are_zero() {
        let job = Job {
            routing: Routing::File("routing.npy".into()),
            ..small()
        };
        let model = Model::new(&job);
        let mut routes = Routes {
            ids: vec![-1; 18],
            weights: vec![0.0; 18],
        };
        routes.ids[3] = 5;
        routes.weights[3] = 2.5;
        let out = layer(&job, &model, &model.tokens(0), &routes).unwrap();
        for (token, row) in out.chunks_exact(job.hidden).enumerate() {
            assert_eq!(row.iter().all(|&v| v == 0.0), token != 1, "{token}");
        }
    }

    #[test]
    fn a_wrong_router_is_found() {
        let job = small();
        let model = Model::new(&job);
        let x = model.tokens(0);
        let routes = router::route(&job, &model, 0, &x).unwrap();
        let mut swapped = routes.clone();
        swapped.ids.swap(6, 7);
        swapped.weights.swap(6, 7);
        assert!(matches!(
            layer(&job, &model, &x, &swapped),
            Err(GateError::Experts { token: 2, .. })
        ));
        let mut heavier = routes;
        heavier.weights[4] *= 1.001;
        assert!(matches!(
            layer(&job, &model, &x, &heavier),
            Err(GateError::Weights { token: 1, .. })
        ));
    }
}
