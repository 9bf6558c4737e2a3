//! Combine: expert outputs back to the tokens' ranks.

use ep_kernels::ffi::{EP_COMBINE_RECV, EP_COMBINE_SEND, EP_COMBINE_WEIGHTS};

use crate::dispatch::{Sizes, check_stream};
use crate::error::{ArgumentError, Rejected};
use crate::order::{Parts, Unreceived};
use crate::state::DeviceState;
use crate::{Buffer, DType, Error, Handle, Operation, Stream, TensorMut, TensorRef, launch};

/// What a rank gives back.
#[derive(Clone, Copy, Debug)]
pub struct CombineInput<'a> {
    /// Expert outputs where the dispatch put the inputs, bf16 `[L, N, H]`. They are read in place and
    /// copied nowhere first, so an expert that writes this tensor writes where combine reads.
    pub y: TensorRef<'a>,
    /// Weights of this rank's tokens, f32 `[T, K]`, if they are given here and not by the dispatch.
    /// All ranks give them, or none. Without any, the outputs are summed as they are.
    pub topk_weights: Option<TensorRef<'a>>,
}

impl<'a> CombineInput<'a> {
    /// Expert outputs, with the weights that came with the dispatch.
    pub fn new(y: impl Into<TensorRef<'a>>) -> Self {
        Self {
            y: y.into(),
            topk_weights: None,
        }
    }

    /// With weights given here.
    #[must_use]
    pub fn with_weights(mut self, topk_weights: impl Into<TensorRef<'a>>) -> Self {
        self.topk_weights = Some(topk_weights.into());
        self
    }
}

/// A combine that has been sent and not received. [`Buffer::combine_receive`] takes it.
///
/// Dropping it without receiving leaves this rank out of step with the others: the buffer then
/// refuses further operations.
#[derive(Debug)]
#[must_use = "a combine that is not received leaves the ranks out of step"]
pub struct PendingCombine {
    unreceived: Unreceived,
    handle: Handle,
}

impl Buffer {
    /// Enqueues a combine on `stream`: `out`, bf16 `[T, H]`, is for each token the weighted sum of
    /// its experts' outputs.
    ///
    /// Within a rank the outputs are summed in the order of the token's experts, over ranks in
    /// ascending order; the same input gives the same bits. A token without experts gives zeros. The
    /// output is written when the stream has passed the operation; the input must not change before.
    ///
    /// # Errors
    /// The arguments are checked before anything is launched, the buffer stays usable, and the
    /// handle comes back with the error; `?` [gives it up](Rejected). A rank that does not come in
    /// time is no error here but a [fault](Self::faults).
    pub fn combine<'o>(
        &self,
        stream: &Stream,
        handle: Handle,
        input: &CombineInput<'_>,
        out: impl Into<TensorMut<'o>>,
    ) -> Result<(), Rejected<Handle>> {
        let launched = self
            .checked(stream, &handle, |state, call| {
                let call = checked_input(state, call, input)?;
                checked_output(state, call, &out.into())
            })
            .and_then(|mut call| {
                call.flags |= EP_COMBINE_SEND | EP_COMBINE_RECV;
                self.enqueue_combine(stream, &call, Parts::Both)
            });
        match launched {
            Ok(_) => Ok(()),
            Err(error) => Err(Rejected::new(handle, error)),
        }
    }

    /// Enqueues the send part of a combine. The input must not change before the stream has passed
    /// it. Sent combines are received in their order.
    pub fn combine_send(
        &self,
        stream: &Stream,
        handle: Handle,
        input: &CombineInput<'_>,
    ) -> Result<PendingCombine, Rejected<Handle>> {
        let launched = self
            .checked(stream, &handle, |state, call| {
                checked_input(state, call, input)
            })
            .and_then(|mut call| {
                call.flags |= EP_COMBINE_SEND;
                self.enqueue_combine(stream, &call, Parts::Send)
            });
        match launched {
            Ok(number) => Ok(PendingCombine {
                unreceived: self.unreceived(Operation::Combine, number),
                handle,
            }),
            Err(error) => Err(Rejected::new(handle, error)),
        }
    }

    /// Enqueues the receive part of a combine. The output, bf16 `[T, H]`, is written when the stream
    /// has passed it.
    ///
    /// # Errors
    /// As for [`combine`](Self::combine); the pending combine comes back with the error, and `?`
    /// [gives it up](Rejected).
    pub fn combine_receive<'o>(
        &self,
        stream: &Stream,
        pending: PendingCombine,
        out: impl Into<TensorMut<'o>>,
    ) -> Result<(), Rejected<PendingCombine>> {
        let launched = self
            .checked(stream, &pending.handle, |state, call| {
                checked_output(state, call, &out.into())
            })
            .and_then(|mut call| {
                call.flags |= EP_COMBINE_RECV;
                self.enqueue_combine(stream, &call, pending.unreceived.parts())
            });
        match launched {
            Ok(_) => {
                pending.unreceived.received();
                Ok(())
            }
            Err(error) => Err(Rejected::new(pending, error)),
        }
    }

    /// Checks a combine of a handle.
    fn checked(
        &self,
        stream: &Stream,
        handle: &Handle,
        check: impl FnOnce(&DeviceState, launch::Combine) -> Result<launch::Combine, ArgumentError>,
    ) -> Result<launch::Combine, Error> {
        self.check_own(&handle.lease)?;
        let state = self.state();
        self.check(Operation::Combine, || {
            check_stream(stream, state)?;
            let call = launch::Combine {
                slot: handle.lease.index(),
                num_tokens: handle.num_tokens,
                top_k: handle.top_k,
                ..launch::Combine::default()
            };
            check(state, call)
        })
    }

    fn enqueue_combine(
        &self,
        stream: &Stream,
        call: &launch::Combine,
        parts: Parts,
    ) -> Result<u64, Error> {
        self.enqueue(Operation::Combine, parts, stream, |launcher| {
            launcher
                .combine(call, stream)
                .map_err(|source| self.launch_error(source))
        })
        .map(|((), number)| number)
    }
}

fn checked_input(
    state: &DeviceState,
    call: launch::Combine,
    input: &CombineInput<'_>,
) -> Result<launch::Combine, ArgumentError> {
    let Sizes {
        local_experts,
        rows,
        hidden,
        ..
    } = Sizes::of(state);
    let device = &state.device;
    let y = input
        .y
        .raw()
        .check("y", device, DType::Bf16, [local_experts, rows, hidden])?;
    let dims = [call.num_tokens as usize, call.top_k as usize];
    let weights = input.topk_weights.map(|weights| {
        weights
            .raw()
            .check("topk_weights", device, DType::F32, dims)
    });
    let weights_flag = if weights.is_some() {
        EP_COMBINE_WEIGHTS
    } else {
        0
    };
    Ok(launch::Combine {
        flags: call.flags | weights_flag,
        y,
        topk_weights: weights.transpose()?.unwrap_or(0),
        ..call
    })
}

fn checked_output(
    state: &DeviceState,
    call: launch::Combine,
    out: &TensorMut<'_>,
) -> Result<launch::Combine, ArgumentError> {
    let dims = [call.num_tokens as usize, state.shape.hidden as usize];
    let out = out.raw().check("out", &state.device, DType::Bf16, dims)?;
    Ok(launch::Combine { out, ..call })
}
