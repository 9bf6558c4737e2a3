/* The contract of the dispatch and combine kernels, in plain C99.
 *
 * Device addresses are uint64_t and streams are opaque, so that the header needs no CUDA header
 * and the host implementation takes the very same structs. Rust bindings of this file are generated
 * into kernels/src/bindings.rs by `cargo xtask codegen`.
 *
 * Shapes: R ranks, E experts, L = E / R local experts (rank r owns experts [r*L, (r+1)*L)), T
 * tokens of this rank (T <= max_tokens = M), H hidden, K top-k. Row-major unless said otherwise.
 */
#ifndef EP_KERNELS_H
#define EP_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EP_KERNELS_ABI_VERSION 3u

/* Limits of the wire format: an entry packs a local expert into 11 bits, a top-k index into 5 and a
 * position within (source, expert) into 16. */
#define EP_MAX_LOCAL_EXPERTS 2048u
#define EP_MAX_EXPERTS 8192u
#define EP_MAX_TOP_K 32u
#define EP_MAX_HIDDEN 65536u
#define EP_MAX_TOKENS 65536u
#define EP_MAX_RANKS 1024u
#define EP_HIDDEN_MULTIPLE 128u

/* A line is the unit of the wire: 120 bytes of data and an 8-byte epoch that travels with them. */
#define EP_LINE_BYTES 128u
#define EP_LINE_DATA_BYTES 120u

/* Flags of ep_dispatch_args. */
#define EP_DISPATCH_FP8 1u     /* quantise to E4M3, one float32 scale per 128 channels */
#define EP_DISPATCH_WEIGHTS 2u /* topk_weights travel with the tokens */
#define EP_DISPATCH_SEND 4u    /* send part */
#define EP_DISPATCH_RECV 8u    /* receive part; both parts may be one launch */
#define EP_DISPATCH_POW2 16u   /* with FP8: round scales up to powers of two */
#define EP_DISPATCH_UE8M0                                                                          \
  32u /* with POW2: scales are stored as exponents, four packed in an int32 */

/* Flags of ep_combine_args. */
#define EP_COMBINE_WEIGHTS 1u /* topk_weights are given here, at the source */
#define EP_COMBINE_SEND 4u
#define EP_COMBINE_RECV 8u

/* Return values of launchers. */
#define EP_LAUNCH_OK 0
#define EP_LAUNCH_CUDA_ERROR 1  /* *cuda_error says which */
#define EP_LAUNCH_BAD_ARGS 2    /* struct_size or a shape outside the limits */
#define EP_LAUNCH_UNSUPPORTED 3 /* not on this device */
#define EP_LAUNCH_TOO_LARGE 4   /* the shape needs more shared memory than a block has here */

/* What a fault record reports. */
#define EP_FAULT_NONE 0u
#define EP_FAULT_TIMEOUT 1u         /* value: nanoseconds waited */
#define EP_FAULT_EXPERT_RANGE 2u    /* token, value: the expert id */
#define EP_FAULT_EXPERT_REPEATED 3u /* token, value: the expert id; counted once */
#define EP_FAULT_UNREACHABLE 4u     /* token: one that goes to a peer whose table entry is null */
#define EP_FAULT_ABORTED 5u         /* a wait that the host called off */

#define EP_OP_DISPATCH 1u
#define EP_OP_COMBINE 2u
#define EP_OP_BARRIER 3u

#define EP_PHASE_SEND 1u
#define EP_PHASE_COUNTS 2u
#define EP_PHASE_ROWS 3u
#define EP_PHASE_WEIGHTS 4u
#define EP_PHASE_PARTIALS 5u
#define EP_PHASE_BARRIER 6u

/* One record of the fault ring, in page-locked host memory. Written once per (part, peer) or
 * per bad entry; `sequence` is stored last, is 1-based, and is never 0 in a written record. */
typedef struct ep_fault {
  uint64_t sequence;
  uint64_t epoch; /* of the operation, counted per kind from 1 */
  uint32_t fault;
  uint32_t op;
  uint32_t phase;
  uint32_t peer; /* rank waited for, or the reporting rank for bad entries */
  uint64_t token;
  int64_t value;
} ep_fault;

#define EP_FAULT_BYTES 48u
#define EP_FAULT_RING 64u /* records; the newest overwrite the oldest */

/* Device-resident state of one buffer, zeroed when the buffer is made and kept by the kernels.
 * Opaque to the host but for
 *   its size, EP_CONTROL_BYTES(R);
 *   `active`, the participation table at offset 0: one u32 a rank, non-zero takes part; not changed
 *   while an operation runs. A rank itself always takes part;
 *   the two u64s at EP_CONTROL_WAIT(R, i) for each i below EP_CONTROL_WAITS. At any time the host
 *   may write EP_ABORTED to all of them: from then on waits end within milliseconds, as by the
 *   time-out, until the block is zeroed. */
#define EP_CONTROL_FIXED_BYTES 1024u
#define EP_CONTROL_BYTES(num_ranks) (EP_CONTROL_FIXED_BYTES + 128u * (num_ranks))
#define EP_CONTROL_WAITS 5u
#define EP_CONTROL_WAIT(num_ranks, i) ((4u * (num_ranks) + 127u) / 128u * 128u + 32u * (i) + 8u)
#define EP_ABORTED 1u

/* Where things lie in every rank's symmetric buffer (bytes from its base), the same on all ranks.
 *
 *   counts   [ring][R sources][L + 1]      8-byte packets {u32 value, u32 epoch}: rows for this
 *                                          rank, then tokens per local expert
 *   rows     [ring][R sources][M]          row_stride bytes: header lines, then payload lines
 *   weights  [slots][R sources][M]         weight_stride bytes of lines: weights given with combine
 *   partials [slots][R owners][M]          partial_stride bytes of lines: bf16 rows on their
 *                                          way back
 *   barrier  [R sources]                   one 128-byte line each
 *
 * `ring` (a power of two) dispatches rotate by epoch; a slot is chosen by the host, one for each
 * handle alive.
 * Sources write only their own part of a region, so a late write can only meet its own writer's. */
typedef struct ep_layout {
  uint64_t counts;
  uint64_t counts_source_stride;
  uint64_t counts_ring_stride;
  uint64_t rows;
  uint64_t row_stride;
  uint64_t rows_source_stride;
  uint64_t rows_ring_stride;
  uint64_t weights;
  uint64_t weight_stride;
  uint64_t weights_source_stride;
  uint64_t weights_slot_stride;
  uint64_t partials;
  uint64_t partial_stride;
  uint64_t partials_source_stride;
  uint64_t partials_slot_stride;
  uint64_t barrier;
  uint64_t bytes; /* whole buffer */
  uint32_t ring;
  uint32_t slots;
  uint32_t header_lines; /* of a row */
  uint32_t weight_lines;
} ep_layout;

/* Who takes part and what the buffer was made for. */
typedef struct ep_group {
  uint64_t peer_table; /* device address of u64[R]: base of each rank's symmetric buffer, or 0 */
  uint64_t control;    /* device address, EP_CONTROL_BYTES(R), zeroed once */
  uint64_t faults;     /* device address of ep_fault[EP_FAULT_RING] in page-locked host memory */
  uint64_t timeout_ns; /* bound on each part's waits, from the first that takes long */
  uint32_t rank;
  uint32_t num_ranks;
  uint32_t num_experts;
  uint32_t max_tokens;
  uint32_t hidden;
  uint32_t max_top_k;
  int32_t device;   /* ordinal in this process; ignored by the host implementation */
  uint32_t num_sms; /* cap on thread blocks; 0: as many as the device has */
} ep_group;

/* What a combine has to know of its dispatch: device memory of this rank, written by the dispatch.
 *   route      u32 [M, max_top_k]   entry k of token t: owner << 16 | slot at the owner, or ~0
 *   recv_map   u64 [R, M, 1 + max_top_k]  row (source, slot): {u32 token, u32 entries}, then per
 *              entry in top-k order {u32 row of recv_x, f32 weight}
 *   recv_rows  u32 [R]  rows received from each source; 0 for one that was given up, or a number
 *                       with EP_ROWS_GIVEN_UP
 */
#define EP_ROWS_GIVEN_UP 0x80000000u
typedef struct ep_handle {
  uint64_t route;
  uint64_t recv_map;
  uint64_t recv_rows;
  uint32_t slot;
  uint32_t num_tokens;
  uint32_t top_k;
  uint32_t reserved;
} ep_handle;

/* Dispatch. Inputs are complete and outputs free when the stream reaches the launch; x and recv_x
 * are aligned to 16 bytes.
 *   x             bf16 [T, H]
 *   topk_idx      i64 [T, K]; -1 is no expert; out of range is skipped and reported
 *   topk_weights  f32 [T, K] with EP_DISPATCH_WEIGHTS, else 0
 *   recv_x        [L, R*M, H] bf16, or E4M3 with EP_DISPATCH_FP8. Rows of expert l from source s
 *                 stand at [begin, begin + count) of layout_range[l][s], sources ascending without
 *                 gaps, tokens of a source ascending. Rows beyond recv_count[l] are not written.
 *   recv_scales   with FP8: f32 stored [L, H/128, R*M] (token stride 1). With UE8M0: int32 stored
 *                 [L, ceil(H/512), R*M]
 *   recv_count    i32 [L]
 *   src_info      i32 [L, R*M]: token index at the source
 *   layout_range  i64 [L, R]: begin << 32 | count
 *   total_count   i64 [L] or 0: recv_count is added to it
 *   wait_ns       i64 [R] or 0: the nanoseconds for which the receive part waited for each source's
 *                 counts are added to it, until the time-out for one that is given up
 */
typedef struct ep_dispatch_args {
  uint32_t struct_size;
  uint32_t flags;
  ep_group group;
  ep_layout layout;
  ep_handle handle;
  uint64_t x;
  uint64_t topk_idx;
  uint64_t topk_weights;
  uint64_t recv_x;
  uint64_t recv_scales;
  uint64_t recv_count;
  uint64_t src_info;
  uint64_t layout_range;
  uint64_t total_count;
  uint64_t wait_ns;
} ep_dispatch_args;

/* Combine. y and out are aligned to 16 bytes.
 *   y             bf16 [L, R*M, H]: expert outputs where recv_x had the inputs
 *   topk_weights  f32 [T, K] with EP_COMBINE_WEIGHTS, else 0: then the dispatch's, or 1 if it had
 *                 none
 *   out           bf16 [T, H]: sum over ranks, ascending, of bf16(sum over that rank's entries in
 *                 top-k order of weight * y, in float32), in float32, rounded once to bf16. A token
 *                 without experts gives zeros. A rank given up contributes nothing;
 *                 one that is given up while it sends may be missing from a part of a row only.
 */
typedef struct ep_combine_args {
  uint32_t struct_size;
  uint32_t flags;
  ep_group group;
  ep_layout layout;
  ep_handle handle;
  uint64_t y;
  uint64_t topk_weights;
  uint64_t out;
} ep_combine_args;

/* Barrier of all ranks on the device, after `spin_ns` of waiting: lines ranks up for timing. */
typedef struct ep_barrier_args {
  uint32_t struct_size;
  uint32_t reserved;
  ep_group group;
  ep_layout layout;
  uint64_t spin_ns;
} ep_barrier_args;

/* A kernel of one block that does nothing: what a timed launch costs by itself. */
typedef struct ep_empty_args {
  uint32_t struct_size;
  int32_t device;
} ep_empty_args;

uint32_t ep_kernels_abi_version(void);

/* Loads every kernel onto a device. CUDA otherwise loads a kernel at its first launch and waits for
 * the device to be idle first: for ever, if the device runs an operation that waits for a peer
 * whose launch is still to come. */
int32_t ep_kernels_load(int32_t device, int32_t* cuda_error);

int32_t ep_dispatch_launch(const ep_dispatch_args* args, void* stream, int32_t* cuda_error);
int32_t ep_combine_launch(const ep_combine_args* args, void* stream, int32_t* cuda_error);
int32_t ep_barrier_launch(const ep_barrier_args* args, void* stream, int32_t* cuda_error);
int32_t ep_empty_launch(const ep_empty_args* args, void* stream, int32_t* cuda_error);

/* For the demo's experts, on device memory of [rows, ...]:
 * ep_dequantize_launch: E4M3 [rows, H] with scales of stride `scale_stride` between channel blocks
 * and 1 between rows, to bf16 [rows, H].
 * ep_swiglu_launch: bf16 [rows, 2*I] (gate, up) to bf16 [rows, I], silu(gate) * up in float32. */
typedef struct ep_dequantize_args {
  uint32_t struct_size;
  int32_t device;
  uint64_t x;
  uint64_t scales;
  uint64_t scale_stride;
  uint64_t out;
  uint32_t rows;
  uint32_t hidden;
} ep_dequantize_args;

typedef struct ep_swiglu_args {
  uint32_t struct_size;
  int32_t device;
  uint64_t gate_up;
  uint64_t out;
  uint32_t rows;
  uint32_t intermediate;
} ep_swiglu_args;

int32_t ep_dequantize_launch(const ep_dequantize_args* args, void* stream, int32_t* cuda_error);
int32_t ep_swiglu_launch(const ep_swiglu_args* args, void* stream, int32_t* cuda_error);

#ifdef __cplusplus
}
#endif

#endif
