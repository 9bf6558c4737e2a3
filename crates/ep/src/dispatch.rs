//! Dispatch: tokens to the ranks that own their experts.

use ep_kernels::ffi::{
    EP_DISPATCH_FP8, EP_DISPATCH_POW2, EP_DISPATCH_RECV, EP_DISPATCH_SEND, EP_DISPATCH_UE8M0,
    EP_DISPATCH_WEIGHTS,
};

use crate::error::{ArgumentError, Rejected};
use crate::handle::Lease;
use crate::order::{Parts, Unreceived};
use crate::state::DeviceState;
use crate::{
    Buffer, DType, Device, Error, Handle, Operation, Stream, Tensor, TensorMut, TensorRef, launch,
};

/// The form in which tokens travel and arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    /// Bfloat16, as they are.
    #[default]
    Bf16,
    /// E4M3 with a scale for every 128 channels of a token: 448 / amax, amax no less than 1e-4.
    Fp8(Scales),
}

/// How the scales of FP8 tokens are stored. What is stored is the inverse, which dequantises.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scales {
    /// As f32, exactly amax / 448.
    #[default]
    F32,
    /// As f32, rounded up to a power of two.
    Pow2,
    /// As exponents of powers of two, four packed in an i32.
    Ue8m0,
}

impl Format {
    fn flags(self) -> u32 {
        match self {
            Self::Bf16 => 0,
            Self::Fp8(Scales::F32) => EP_DISPATCH_FP8,
            Self::Fp8(Scales::Pow2) => EP_DISPATCH_FP8 | EP_DISPATCH_POW2,
            Self::Fp8(Scales::Ue8m0) => EP_DISPATCH_FP8 | EP_DISPATCH_POW2 | EP_DISPATCH_UE8M0,
        }
    }

    /// Element type of the rows.
    fn rows(self) -> DType {
        match self {
            Self::Bf16 => DType::Bf16,
            Self::Fp8(_) => DType::E4m3,
        }
    }

    /// Element type of the scales and how many a row has.
    fn scales(self, hidden: usize) -> Option<(DType, usize)> {
        match self {
            Self::Bf16 => None,
            Self::Fp8(Scales::F32 | Scales::Pow2) => Some((DType::F32, hidden / 128)),
            Self::Fp8(Scales::Ue8m0) => Some((DType::I32, hidden.div_ceil(512))),
        }
    }
}

/// How to dispatch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct DispatchOptions {
    /// The form in which tokens travel and arrive. The same on every rank.
    pub format: Format,
}

impl DispatchOptions {
    /// Bfloat16.
    pub fn bf16() -> Self {
        Self {
            format: Format::Bf16,
        }
    }

    /// FP8, with scales of this form.
    ///
    /// Rows are quantised in shared memory. Where that is too small for a buffer's `hidden` and
    /// number of experts (on Hopper for 65536 with 8192 experts on 4 ranks, not for 65536 with 4096),
    /// such a dispatch is refused with [`LaunchError::TooLarge`](ep_kernels::LaunchError::TooLarge).
    pub fn fp8(scales: Scales) -> Self {
        Self {
            format: Format::Fp8(scales),
        }
    }
}

impl From<Format> for DispatchOptions {
    fn from(format: Format) -> Self {
        Self { format }
    }
}

/// What a rank dispatches. `T` tokens of `H` channels, `K` experts each; `T` may be 0.
#[derive(Clone, Copy, Debug)]
pub struct DispatchInput<'a> {
    /// The tokens, bf16 `[T, H]`.
    pub x: TensorRef<'a>,
    /// Their experts, i64 `[T, K]`; -1 is no expert. An id that the layer does not have is skipped
    /// and [reported](Buffer::faults).
    pub topk_idx: TensorRef<'a>,
    /// The experts' weights, f32 `[T, K]`, if they are to travel with the tokens. All ranks give
    /// them, or none. Combine uses them unless it is given others.
    pub topk_weights: Option<TensorRef<'a>>,
}

/// What a rank receives: `L` local experts, up to `N` (ranks times most tokens) rows each. The
/// tensors are written when the stream has passed the dispatch.
#[derive(Debug)]
pub struct DispatchOutput {
    /// Rows by local expert, `[L, N, H]`: bf16, or E4M3 with FP8. Rows of one source rank stand
    /// together, sources ascending without gaps, tokens ascending. Rows beyond `recv_count` are not
    /// written.
    pub recv_x: Tensor,
    /// With FP8 the rows' scales, stored with the row index innermost: f32 `[L, H / 128, N]`, or i32
    /// `[L, ceil(H / 512), N]` with [`Scales::Ue8m0`].
    pub recv_scales: Option<Tensor>,
    /// Rows of each local expert, i32 `[L]`.
    pub recv_count: Tensor,
    /// The index that each row's token has at its source, i32 `[L, N]`.
    pub src_info: Tensor,
    /// Where the rows of each source rank begin and how many they are, i64 `[L, R]`: begin << 32 |
    /// count.
    pub layout_range: Tensor,
}

/// The tensors of a [`DispatchOutput`] as views, for a caller's own, and what else a dispatch can be
/// asked for.
///
/// `L` local experts, `R` ranks. [`total_count`](Self::with_total_count), i64 `[L]`, and
/// [`wait_ns`](Self::with_wait_ns), i64 `[R]`, are sums over dispatches: zero them once, then give
/// them to as many as the sums are to cover, replayed graphs included.
///
/// ```
/// # use ep::driver::DeviceOrdinal;
/// # use ep::{Buffer, Communicator, Config, Device, DispatchInput, DispatchOptions};
/// use ep::{DType, DispatchOutputMut, Stream, Tensor};
/// # use ep_sim::{Cluster, SimDriver};
///
/// # let device = Device::host(SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]), DeviceOrdinal(0));
/// # let comm = Communicator::threads(1).remove(0);
/// # let buffer = Buffer::builder(&device, &comm, Config::new(128, 2, 3, 1)).build()?;
/// # let options = DispatchOptions::bf16();
/// # let mut received = buffer.new_output(&options)?;
/// # let x = Tensor::from_host(&device, DType::Bf16, [3, 128], &[0x3f80_u16; 3 * 128])?;
/// # let topk_idx = Tensor::from_host(&device, DType::I64, [3, 1], &[0_i64, 1, 1])?;
/// # let input = DispatchInput { x: x.view(), topk_idx: topk_idx.view(), topk_weights: None };
/// let stream = Stream::new(&device)?;
/// let experts = buffer.local_experts() as usize;
/// let mut total_count = Tensor::new(&device, DType::I64, [experts])?;
/// let mut wait_ns = Tensor::new(&device, DType::I64, [buffer.num_ranks() as usize])?;
/// total_count.fill(0, &stream)?;
/// wait_ns.fill(0, &stream)?;
///
/// for _ in 0..2 {
///     // Three tokens: one for expert 0, two for expert 1.
///     let output = DispatchOutputMut::from(&mut received)
///         .with_total_count(&mut total_count)
///         .with_wait_ns(&mut wait_ns);
///     buffer.dispatch(&stream, &input, &options, output)?;
/// }
/// stream.synchronize()?;
/// assert_eq!(received.recv_count.copy_to_host::<i32>()?, [1, 2]);
/// assert_eq!(total_count.copy_to_host::<i64>()?, [2, 4]);
/// assert!(wait_ns.copy_to_host::<i64>()?[0] > 0);
/// # buffer.close()?;
/// # Ok::<(), ep::Error>(())
/// ```
#[derive(Debug)]
pub struct DispatchOutputMut<'a> {
    /// As [`DispatchOutput::recv_x`].
    pub recv_x: TensorMut<'a>,
    /// As [`DispatchOutput::recv_scales`].
    pub recv_scales: Option<TensorMut<'a>>,
    /// As [`DispatchOutput::recv_count`].
    pub recv_count: TensorMut<'a>,
    /// As [`DispatchOutput::src_info`].
    pub src_info: TensorMut<'a>,
    /// As [`DispatchOutput::layout_range`].
    pub layout_range: TensorMut<'a>,
    /// See [`with_total_count`](Self::with_total_count).
    pub total_count: Option<TensorMut<'a>>,
    /// See [`with_wait_ns`](Self::with_wait_ns).
    pub wait_ns: Option<TensorMut<'a>>,
}

impl<'a> DispatchOutputMut<'a> {
    /// Asks for rows over several dispatches, i64 `[L]`: `recv_count` is added to it, for instance to
    /// place experts anew by what they get.
    ///
    /// The receive part reads and writes it; it must not be used otherwise until the stream has
    /// passed that.
    #[must_use]
    pub fn with_total_count(mut self, total_count: impl Into<TensorMut<'a>>) -> Self {
        self.total_count = Some(total_count.into());
        self
    }

    /// Asks how long each rank let this one wait, i64 `[R]`, nanoseconds: for each source rank the
    /// time is added from the start of the launch that receives until the source's counts, which it
    /// sends before its rows, were there. So the rank that holds the group up stands out.
    ///
    /// For a source that is given up the time ends there, at the
    /// [time-out](crate::BufferBuilder::timeout). Nothing is added for one that takes no part or cannot
    /// be reached. The time includes what counts take anyway, a few
    /// microseconds on a GPU, and in a dispatch of one launch this rank's own sending beside it; its
    /// entry for itself says how much that is. The receive part reads and writes it; it must not be
    /// used otherwise until the stream has passed that.
    #[must_use]
    pub fn with_wait_ns(mut self, wait_ns: impl Into<TensorMut<'a>>) -> Self {
        self.wait_ns = Some(wait_ns.into());
        self
    }
}

impl<'a> From<&'a mut DispatchOutput> for DispatchOutputMut<'a> {
    fn from(output: &'a mut DispatchOutput) -> Self {
        Self {
            recv_x: output.recv_x.view_mut(),
            recv_scales: output.recv_scales.as_mut().map(Tensor::view_mut),
            recv_count: output.recv_count.view_mut(),
            src_info: output.src_info.view_mut(),
            layout_range: output.layout_range.view_mut(),
            total_count: None,
            wait_ns: None,
        }
    }
}

impl DispatchOutput {
    /// Fills every byte of every tensor, ordered on the stream.
    ///
    /// # Errors
    /// [`Error::OtherDevice`] if the stream is not of the tensors' device; none is filled then.
    pub fn fill(&mut self, byte: u8, stream: &Stream) -> Result<(), Error> {
        let Self {
            recv_x,
            recv_scales,
            recv_count,
            src_info,
            layout_range,
        } = self;
        let mut tensors: Vec<_> = [recv_x, recv_count, src_info, layout_range]
            .into_iter()
            .chain(recv_scales)
            .collect();
        tensors
            .iter()
            .try_for_each(|tensor| tensor.check_stream(stream))?;
        tensors
            .iter_mut()
            .try_for_each(|tensor| tensor.fill(byte, stream))
    }
}

/// A dispatch that has been sent and not received.
///
/// Between the two parts the rows are on their way and nothing runs on the device, so that other
/// work of the stream can. It borrows nothing: an engine may keep it beside the buffer from one step
/// to the next. [`Buffer::dispatch_receive`] takes it. Dropping it without receiving leaves this rank
/// out of step with the others: the buffer then refuses further operations.
#[derive(Debug)]
#[must_use = "a dispatch that is not received leaves the ranks out of step"]
pub struct PendingDispatch {
    unreceived: Unreceived,
    lease: Lease,
    num_tokens: u32,
    top_k: u32,
    format: Format,
}

impl Buffer {
    /// Output tensors for dispatches of this format, contents undefined.
    pub fn new_output(&self, options: &DispatchOptions) -> Result<DispatchOutput, Error> {
        let sizes = Sizes::of(self.state());
        let device = self.device();
        let tensor = |dtype, dims: &[usize]| match *dims {
            [a] => Tensor::new(device, dtype, [a]),
            [a, b] => Tensor::new(device, dtype, [a, b]),
            _ => Tensor::new(device, dtype, [dims[0], dims[1], dims[2]]),
        };
        let Sizes {
            local_experts: l,
            rows: n,
            hidden: h,
            ranks: r,
        } = sizes;
        let scales = options.format.scales(h);
        Ok(DispatchOutput {
            recv_x: tensor(options.format.rows(), &[l, n, h])?,
            recv_scales: scales
                .map(|(dtype, per_row)| tensor(dtype, &[l, per_row, n]))
                .transpose()?,
            recv_count: tensor(DType::I32, &[l])?,
            src_info: tensor(DType::I32, &[l, n])?,
            layout_range: tensor(DType::I64, &[l, r])?,
        })
    }

    /// Enqueues a dispatch on `stream`.
    ///
    /// Every rank dispatches, with its own tokens. The output is written when the stream has passed
    /// the operation; the input must not change before.
    ///
    /// # Errors
    /// The arguments are checked before anything is launched, and the buffer stays usable. A rank
    /// that does not come in time is no error here but a [fault](Self::faults).
    pub fn dispatch<'o>(
        &self,
        stream: &Stream,
        input: &DispatchInput<'_>,
        options: &DispatchOptions,
        output: impl Into<DispatchOutputMut<'o>>,
    ) -> Result<Handle, Error> {
        let output = output.into();
        let state = self.state();
        let mut call = self.check(Operation::Dispatch, || {
            check_stream(stream, state)?;
            let sent = checked_input(state, input, options.format)?;
            checked_output(state, sent, &output, options.format)
        })?;
        call.flags |= EP_DISPATCH_SEND | EP_DISPATCH_RECV;
        let (lease, epoch) = self.enqueue_dispatch(stream, &mut call, Parts::Both)?;
        Ok(Handle {
            lease,
            num_tokens: call.num_tokens,
            top_k: call.top_k,
            epoch,
        })
    }

    /// Enqueues the send part of a dispatch. The input must not change before the stream has passed
    /// it.
    ///
    /// Sent dispatches are received in their order, and no other dispatch comes between unless it is
    /// sent too; at most [`Config::sends_in_flight`](crate::Config::sends_in_flight) at once.
    ///
    /// # Two batches
    /// While one batch's rows are on their way the stream works for the other, so that neither waits
    /// for the wire. The example `two_batches` does that for a whole layer.
    ///
    /// ```
    /// # use ep::driver::DeviceOrdinal;
    /// # use ep::{Communicator, DType, Device, DispatchInput, DispatchOptions, Stream, Tensor};
    /// use ep::{Buffer, CombineInput, Config};
    /// # use ep_sim::{Cluster, SimDriver};
    ///
    /// # let device = Device::host(SimDriver::new(&Cluster::hgx_h200(1), 0, &[0]), DeviceOrdinal(0));
    /// # let comm = Communicator::threads(1).remove(0);
    /// # let stream = Stream::new(&device)?;
    /// # let options = DispatchOptions::bf16();
    /// let config = Config::new(128, 2, 3, 1).with_sends_in_flight(2);
    /// let buffer = Buffer::builder(&device, &comm, config).build()?;
    /// # let x = Tensor::from_host(&device, DType::Bf16, [3, 128], &[0x3f80_u16; 3 * 128])?;
    /// # let topk_idx = Tensor::from_host(&device, DType::I64, [3, 1], &[0_i64, 1, 1])?;
    /// # let input = || DispatchInput { x: x.view(), topk_idx: topk_idx.view(), topk_weights: None };
    /// # let [a, b] = [input(), input()];
    /// # let mut received_a = buffer.new_output(&options)?;
    /// # let mut received_b = buffer.new_output(&options)?;
    /// # let mut out_a = Tensor::new(&device, DType::Bf16, [3, 128])?;
    /// # let mut out_b = Tensor::new(&device, DType::Bf16, [3, 128])?;
    ///
    /// let sent_a = buffer.dispatch_send(&stream, &a, &options)?;
    /// // Attention of batch b would run here, while the rows of a are on their way.
    /// let sent_b = buffer.dispatch_send(&stream, &b, &options)?;
    /// let handle_a = buffer.dispatch_receive(&stream, sent_a, &mut received_a)?;
    /// // Experts of batch a, while the rows of b are on their way.
    /// let y_a = CombineInput::new(&received_a.recv_x);
    /// let back_a = buffer.combine_send(&stream, handle_a, &y_a)?;
    /// let handle_b = buffer.dispatch_receive(&stream, sent_b, &mut received_b)?;
    /// // Experts of batch b, while the sums of a are on their way.
    /// let y_b = CombineInput::new(&received_b.recv_x);
    /// let back_b = buffer.combine_send(&stream, handle_b, &y_b)?;
    /// buffer.combine_receive(&stream, back_a, &mut out_a)?;
    /// buffer.combine_receive(&stream, back_b, &mut out_b)?;
    /// stream.synchronize()?;
    /// # assert_eq!(out_a.copy_to_host::<u16>()?, [0x3f80; 3 * 128]);
    /// # assert_eq!(out_b.copy_to_host::<u16>()?, [0x3f80; 3 * 128]);
    /// # buffer.close()?;
    /// # Ok::<(), ep::Error>(())
    /// ```
    pub fn dispatch_send(
        &self,
        stream: &Stream,
        input: &DispatchInput<'_>,
        options: &DispatchOptions,
    ) -> Result<PendingDispatch, Error> {
        let state = self.state();
        let mut call = self.check(Operation::Dispatch, || {
            check_stream(stream, state)?;
            checked_input(state, input, options.format)
        })?;
        call.flags |= EP_DISPATCH_SEND;
        let (lease, number) = self.enqueue_dispatch(stream, &mut call, Parts::Send)?;
        Ok(PendingDispatch {
            unreceived: self.unreceived(Operation::Dispatch, number),
            lease,
            num_tokens: call.num_tokens,
            top_k: call.top_k,
            format: options.format,
        })
    }

    /// Enqueues the receive part of a dispatch. The output, and what else it was asked for, is
    /// written when the stream has passed it.
    ///
    /// # Errors
    /// As for [`dispatch`](Self::dispatch); the pending dispatch comes back with the error, and `?`
    /// [gives it up](Rejected).
    pub fn dispatch_receive<'o>(
        &self,
        stream: &Stream,
        pending: PendingDispatch,
        output: impl Into<DispatchOutputMut<'o>>,
    ) -> Result<Handle, Rejected<PendingDispatch>> {
        match self.enqueue_receive(stream, &pending, &output.into()) {
            Ok(()) => {
                let epoch = pending.unreceived.received();
                Ok(Handle {
                    lease: pending.lease,
                    num_tokens: pending.num_tokens,
                    top_k: pending.top_k,
                    epoch,
                })
            }
            Err(error) => Err(Rejected::new(pending, error)),
        }
    }

    fn enqueue_receive(
        &self,
        stream: &Stream,
        pending: &PendingDispatch,
        output: &DispatchOutputMut<'_>,
    ) -> Result<(), Error> {
        self.check_own(&pending.lease)?;
        let state = self.state();
        let call = self.check(Operation::Dispatch, || {
            check_stream(stream, state)?;
            let call = launch::Dispatch {
                flags: pending.format.flags() | EP_DISPATCH_RECV,
                slot: pending.lease.index(),
                num_tokens: pending.num_tokens,
                top_k: pending.top_k,
                ..launch::Dispatch::default()
            };
            checked_output(state, call, output, pending.format)
        })?;
        let parts = pending.unreceived.parts();
        self.enqueue(Operation::Dispatch, parts, stream, |launcher| {
            launcher
                .dispatch(&call, stream)
                .map_err(|source| self.launch_error(source))
        })
        .map(drop)
    }

    /// Takes a slot and launches. The answer is the slot and the operation's number.
    fn enqueue_dispatch(
        &self,
        stream: &Stream,
        call: &mut launch::Dispatch,
        parts: Parts,
    ) -> Result<(Lease, u64), Error> {
        self.enqueue(Operation::Dispatch, parts, stream, |launcher| {
            let lease = self.lease()?;
            call.slot = lease.index();
            launcher
                .dispatch(call, stream)
                .map_err(|source| self.launch_error(source))?;
            Ok(lease)
        })
    }
}

/// The sizes of tensors, as hosts count.
pub(crate) struct Sizes {
    pub(crate) local_experts: usize,
    /// Of a local expert.
    pub(crate) rows: usize,
    pub(crate) hidden: usize,
    pub(crate) ranks: usize,
}

impl Sizes {
    pub(crate) fn of(state: &DeviceState) -> Self {
        let shape = &state.shape;
        Self {
            local_experts: shape.local_experts() as usize,
            rows: shape.rows_per_expert() as usize,
            hidden: shape.hidden as usize,
            ranks: shape.num_ranks as usize,
        }
    }
}

pub(crate) fn check_stream(stream: &Stream, state: &DeviceState) -> Result<(), ArgumentError> {
    let (expected, got): (&Device, &Device) = (&state.device, stream.device());
    if got.is_same(expected) {
        Ok(())
    } else {
        Err(ArgumentError::Device {
            field: "stream",
            expected: expected.clone(),
            got: got.clone(),
        })
    }
}

fn checked_input(
    state: &DeviceState,
    input: &DispatchInput<'_>,
    format: Format,
) -> Result<launch::Dispatch, ArgumentError> {
    let DispatchInput {
        x,
        topk_idx,
        topk_weights,
    } = input;
    let tokens = match *x.dims().as_slice() {
        [tokens, _] => tokens,
        _ => return Err(two_dimensions("x", x)),
    };
    let top_k = match *topk_idx.dims().as_slice() {
        [_, top_k] => top_k,
        _ => return Err(two_dimensions("topk_idx", topk_idx)),
    };
    let num_tokens = in_range("tokens", tokens, 0, state.shape.max_tokens)?;
    let num_experts = in_range("top_k", top_k, 1, state.shape.max_top_k)?;
    let device = &state.device;
    let hidden = state.shape.hidden as usize;
    let weights = topk_weights.map(|weights| {
        weights
            .raw()
            .check("topk_weights", device, DType::F32, [tokens, top_k])
    });
    let weights_flag = if weights.is_some() {
        EP_DISPATCH_WEIGHTS
    } else {
        0
    };
    Ok(launch::Dispatch {
        flags: format.flags() | weights_flag,
        num_tokens,
        top_k: num_experts,
        x: x.raw().check("x", device, DType::Bf16, [tokens, hidden])?,
        topk_idx: topk_idx
            .raw()
            .check("topk_idx", device, DType::I64, [tokens, top_k])?,
        topk_weights: weights.transpose()?.unwrap_or(0),
        ..launch::Dispatch::default()
    })
}

/// Adds the output to a call.
fn checked_output(
    state: &DeviceState,
    call: launch::Dispatch,
    output: &DispatchOutputMut<'_>,
    format: Format,
) -> Result<launch::Dispatch, ArgumentError> {
    let Sizes {
        local_experts: l,
        rows: n,
        hidden: h,
        ranks: r,
    } = Sizes::of(state);
    let device = &state.device;
    let check = |field, tensor: &TensorMut<'_>, dtype, dims: crate::Dims| {
        tensor.raw().check(field, device, dtype, dims)
    };
    // Without the tensor the address is 0.
    let sums = |field, tensor: &Option<TensorMut<'_>>, len: usize| {
        tensor.as_ref().map_or(Ok(0), |tensor| {
            check(field, tensor, DType::I64, [len].into())
        })
    };
    let recv_scales = match (format.scales(h), &output.recv_scales) {
        (None, None) => 0,
        (Some((dtype, per_row)), Some(scales)) => {
            check("recv_scales", scales, dtype, [l, per_row, n].into())?
        }
        (wanted, _) => {
            return Err(ArgumentError::Presence {
                field: "recv_scales",
                wanted: wanted.is_some(),
            });
        }
    };
    Ok(launch::Dispatch {
        recv_x: check("recv_x", &output.recv_x, format.rows(), [l, n, h].into())?,
        recv_scales,
        recv_count: check("recv_count", &output.recv_count, DType::I32, [l].into())?,
        src_info: check("src_info", &output.src_info, DType::I32, [l, n].into())?,
        layout_range: check(
            "layout_range",
            &output.layout_range,
            DType::I64,
            [l, r].into(),
        )?,
        total_count: sums("total_count", &output.total_count, l)?,
        wait_ns: sums("wait_ns", &output.wait_ns, r)?,
        ..call
    })
}

fn two_dimensions(field: &'static str, tensor: &TensorRef<'_>) -> ArgumentError {
    ArgumentError::Rank {
        field,
        expected: 2,
        got: tensor.dims(),
    }
}

fn in_range(field: &'static str, got: usize, min: u32, max: u32) -> Result<u32, ArgumentError> {
    match u32::try_from(got) {
        Ok(value) if (min..=max).contains(&value) => Ok(value),
        _ => Err(ArgumentError::Range {
            field,
            got,
            min: min as usize,
            max: max as usize,
        }),
    }
}
