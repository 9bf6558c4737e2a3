//! The experts on a GPU: cuBLAS between the project's two element-wise kernels.

use ep::{DType, DispatchOutput, Stream, Tensor, TensorRef, experts};
use half::bf16;

use super::cublas::Blas;
use super::transport::Experts;
use crate::failure::Failure;
use crate::layer::model::Matrix;
use crate::layer::{Dtype, Job, Model, parallel};

/// The experts of one rank, with scratch memory for one expert at a time.
#[derive(Debug)]
pub(crate) struct GpuExperts {
    blas: Blas,
    stream: Stream,
    weights: Vec<Weights>,
    /// Dequantised rows, with FP8.
    rows: Option<Tensor>,
    gate_up: Tensor,
    activated: Tensor,
}

/// One expert's weights, bf16.
#[derive(Debug)]
struct Weights {
    /// `[2 * intermediate, hidden]`: gate, then up.
    gate_up: Tensor,
    /// `[hidden, intermediate]`
    down: Tensor,
}

impl GpuExperts {
    /// Makes the weights of `rank`'s experts, which get up to `capacity` rows each.
    pub(crate) fn new(
        job: &Job,
        model: &Model,
        rank: usize,
        capacity: usize,
        stream: &Stream,
    ) -> Result<Self, Failure> {
        let device = stream.device();
        let (hidden, intermediate) = (job.hidden, job.intermediate);
        let all = model.experts::<bf16>();
        let locals = job.local_experts();
        let weights = (rank * locals..(rank + 1) * locals)
            .map(|expert| {
                let matrix = |parts: &[Matrix], rows, width| {
                    let mut values = vec![0; parts.len() * rows * width];
                    let lines = values.chunks_exact_mut(width).enumerate().collect();
                    parallel::for_each(
                        job.threads,
                        lines,
                        |(line, values): (usize, &mut [u16])| {
                            let mut row = vec![bf16::ZERO; width];
                            all.fill(expert, parts[line / rows], line % rows, 0, &mut row);
                            for (value, weight) in values.iter_mut().zip(row) {
                                *value = weight.to_bits();
                            }
                        },
                    );
                    Tensor::from_host(device, DType::Bf16, [parts.len() * rows, width], &values)
                };
                Ok(Weights {
                    gate_up: matrix(&[Matrix::Gate, Matrix::Up], intermediate, hidden)?,
                    down: matrix(&[Matrix::Down], hidden, intermediate)?,
                })
            })
            .collect::<Result<_, ep::Error>>()?;
        let scratch = |width| Tensor::new(device, DType::Bf16, [capacity, width]);
        Ok(Self {
            blas: Blas::new(stream)?,
            stream: stream.clone(),
            weights,
            rows: match job.dtype {
                Dtype::Bf16 => None,
                Dtype::Fp8 => Some(scratch(hidden)?),
            },
            gate_up: scratch(2 * intermediate)?,
            activated: scratch(intermediate)?,
        })
    }
}

impl Experts for GpuExperts {
    fn run(
        &mut self,
        counts: &[i32],
        received: &DispatchOutput,
        y: &mut Tensor,
    ) -> Result<(), Failure> {
        for (local, (weights, &count)) in self.weights.iter().zip(counts).enumerate() {
            let rows = usize::try_from(count)?;
            if rows == 0 {
                continue;
            }
            let input = match (&mut self.rows, &received.recv_scales) {
                (Some(scratch), Some(scales)) => {
                    let out = scratch.view_mut().first(rows);
                    experts::dequantize(
                        &self.stream,
                        part(&received.recv_x, local)?,
                        part(scales, local)?,
                        out,
                    )?;
                    scratch.view()
                }
                _ => part(&received.recv_x, local)?,
            };
            let gate_up = self.gate_up.view_mut().first(rows);
            self.blas
                .product(input.first(rows), weights.gate_up.view(), gate_up)?;
            experts::swiglu(
                &self.stream,
                self.gate_up.view().first(rows),
                self.activated.view_mut().first(rows),
            )?;
            let y = y.view_mut().nth(local).ok_or(NoSuchExpert { local })?;
            let activated = self.activated.view().first(rows);
            self.blas
                .product(activated, weights.down.view(), y.first(rows))?;
        }
        Ok(())
    }
}

/// What a dispatch wrote for a local expert.
fn part(tensor: &Tensor, local: usize) -> Result<TensorRef<'_>, NoSuchExpert> {
    tensor.view().nth(local).ok_or(NoSuchExpert { local })
}

/// A count for more experts than there are rows for.
#[derive(Debug, thiserror::Error)]
#[error("local expert {local} has a count but no rows")]
struct NoSuchExpert {
    local: usize,
}
