/* A libcuda of DEVICES devices that journals its calls. Structures and signatures are written from
 * cuda.h, not from the Rust side. Each line begins with the context that was current.
 *   CURRENT             context that is current when a thread starts,
 *   FD                  descriptor that an export gives; -2 means a fresh one,
 *   UNKNOWN_ATTRIBUTE   attribute that the driver is too old to know. */
#include "fake.h"

#include <fcntl.h>
#include <stdlib.h>

typedef unsigned long long u64;

struct location { int type; int id; };
struct prop {
    int type;
    int kinds;
    struct location location;
    void *win32;
    struct { unsigned char compression, gdr; unsigned short usage; unsigned char reserved[4]; } flags;
};
struct access { struct location location; int flags; };
struct ipc { char bytes[64]; };

static __thread void *context = (void *)CURRENT;
static unsigned long long current(void) { return (u64)context; }

unsigned cuInit(unsigned flags) { ENTER(" %u", flags); return 0; }

unsigned cuDeviceGetCount(int *count) { ENTER(""); *count = DEVICES; return 0; }
/* Handles differ from ordinals, so that a mix-up shows. */
unsigned cuDeviceGet(int *device, int ordinal) { ENTER(" %d", ordinal); *device = 10 + ordinal; return 0; }
unsigned cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == UNKNOWN_ATTRIBUTE) return 1;
    ENTER(" %d %d", attribute, device);
    *value = attribute;
    return 0;
}
unsigned cuDeviceGetUuid_v2(unsigned char *uuid, int device) {
    ENTER(" %d", device);
    for (int i = 0; i < 16; i++) uuid[i] = 0xf0 + i;
    return 0;
}
unsigned cuDeviceTotalMem_v2(size_t *bytes, int device) { ENTER(" %d", device); *bytes = (size_t)141 << 30; return 0; }
unsigned cuDeviceGetName(char *name, int size, int device) { ENTER(" %d", device); snprintf(name, size, "Fake %d", device); return 0; }
unsigned cuDeviceGetPCIBusId(char *id, int size, int device) { ENTER(" %d", device); snprintf(id, size, "0000:%02d:00.0", device); return 0; }
unsigned cuDeviceCanAccessPeer(int *can, int device, int peer) { ENTER(" %d %d", device, peer); *can = device != peer; return 0; }

unsigned cuDevicePrimaryCtxRetain(void **out, int device) { ENTER(" %d", device); *out = (void *)(u64)(0xc00 + device); return 0; }
unsigned cuDevicePrimaryCtxRelease_v2(int device) { ENTER(" %d", device); return 0; }
unsigned cuCtxGetCurrent(void **out) { *out = context; return 0; }
unsigned cuCtxSetCurrent(void *new) { ENTER(" %llx", (u64)new); context = new; return 0; }
unsigned cuCtxEnablePeerAccess(void *peer, unsigned flags) { ENTER(" %llx %u", (u64)peer, flags); return 0; }

unsigned cuMemGetAllocationGranularity(size_t *bytes, const struct prop *prop, int option) {
    ENTER(" kinds=%d device=%d option=%d", prop->kinds, prop->location.id, option);
    *bytes = 2 << 20;
    return 0;
}
unsigned cuMemCreate(u64 *handle, size_t bytes, const struct prop *prop, u64 flags) {
    ENTER(" %zu type=%d kinds=%d location=%d/%d win32=%d gdr=%d flags=%llu", bytes, prop->type,
          prop->kinds, prop->location.type, prop->location.id, prop->win32 != 0, prop->flags.gdr, flags);
    *handle = 0x11;
    return 0;
}
unsigned cuMemRelease(u64 handle) { ENTER(" %llx", handle); return 0; }
unsigned cuMemAddressReserve(u64 *ptr, size_t bytes, size_t align, u64 hint, u64 flags) {
    ENTER(" %zu align=%zu hint=%llu flags=%llu", bytes, align, hint, flags);
    *ptr = 0x7000;
    return 0;
}
unsigned cuMemAddressFree(u64 ptr, size_t bytes) { ENTER(" %llx %zu", ptr, bytes); return 0; }
unsigned cuMemMap(u64 ptr, size_t bytes, size_t offset, u64 handle, u64 flags) {
    ENTER(" %llx %zu offset=%zu handle=%llx flags=%llu", ptr, bytes, offset, handle, flags);
    return 0;
}
unsigned cuMemUnmap(u64 ptr, size_t bytes) { ENTER(" %llx %zu", ptr, bytes); return 0; }
unsigned cuMemSetAccess(u64 ptr, size_t bytes, const struct access *access, size_t count) {
    ENTER(" %llx %zu location=%d/%d flags=%d count=%zu", ptr, bytes, access->location.type,
          access->location.id, access->flags, count);
    return 0;
}
unsigned cuMemExportToShareableHandle(void *out, u64 handle, int kind, u64 flags) {
    ENTER(" %llx kind=%d flags=%llu", handle, kind, flags);
    if (kind == 8) memset(out, 0xfa, 64);
    else *(int *)out = FD == -2 ? open("/dev/null", O_RDONLY | O_CLOEXEC) : FD;
    return 0;
}
unsigned cuMemImportFromShareableHandle(u64 *handle, void *shareable, int kind) {
    ENTER(" kind=%d %llx", kind, kind == 8 ? (u64) * (unsigned char *)shareable : (u64)shareable);
    *handle = 0x12;
    return 0;
}

static unsigned char memory[256];
unsigned cuMemAlloc_v2(u64 *ptr, size_t bytes) { ENTER(" %zu", bytes); *ptr = (u64)memory; return 0; }
unsigned cuMemFree_v2(u64 ptr) { ENTER(" %d", ptr == (u64)memory); return 0; }
unsigned cuMemGetInfo_v2(size_t *free, size_t *total) { ENTER(""); *free = 3; *total = 5; return 0; }
unsigned cuIpcGetMemHandle(struct ipc *handle, u64 ptr) { ENTER(" %llx", ptr); memset(handle, 0xab, 64); return 0; }
unsigned cuIpcOpenMemHandle_v2(u64 *ptr, struct ipc handle, unsigned flags) {
    ENTER(" %02x..%02x flags=%u", handle.bytes[0] & 0xff, handle.bytes[63] & 0xff, flags);
    *ptr = 0x9000;
    return 0;
}
unsigned cuIpcCloseMemHandle(u64 ptr) { ENTER(" %llx", ptr); return 0; }

unsigned cuMemHostAlloc(void **host, size_t bytes, unsigned flags) {
    ENTER(" %zu flags=%u", bytes, flags);
    *host = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    memset(*host, 0xff, bytes);
    return 0;
}
unsigned cuMemHostGetDevicePointer_v2(u64 *ptr, void *host, unsigned flags) {
    ENTER(" flags=%u", flags);
    *ptr = (u64)host;
    return 0;
}
unsigned cuMemFreeHost(void *host) { ENTER(""); free(host); return 0; }

unsigned cuMemsetD8Async(u64 ptr, unsigned char value, size_t bytes, void *stream) {
    ENTER(" %llx %u %zu stream=%llx", ptr, value, bytes, (u64)stream);
    return 0;
}
unsigned cuMemcpyDtoDAsync_v2(u64 dst, u64 src, size_t bytes, void *stream) {
    ENTER(" %llx %llx %zu stream=%llx", dst, src, bytes, (u64)stream);
    return 0;
}
unsigned cuMemcpyHtoDAsync_v2(u64 dst, const void *src, size_t bytes, void *stream) {
    ENTER(" %zu stream=%llx", bytes, (u64)stream);
    memcpy((void *)dst, src, bytes);
    return 0;
}
unsigned cuMemcpyDtoHAsync_v2(void *dst, u64 src, size_t bytes, void *stream) {
    ENTER(" %zu stream=%llx", bytes, (u64)stream);
    memcpy(dst, (void *)src, bytes);
    return 0;
}

static u64 streams = 0x50;
unsigned cuStreamCreate(void **stream, unsigned flags) { ENTER(" flags=%u", flags); *stream = (void *)streams++; return 0; }
unsigned cuStreamDestroy_v2(void *stream) { ENTER(" %llx", (u64)stream); return 0; }
unsigned cuStreamSynchronize(void *stream) { ENTER(" %llx", (u64)stream); return 0; }
unsigned cuStreamWaitEvent(void *stream, void *event, unsigned flags) { ENTER(" %llx %llx %u", (u64)stream, (u64)event, flags); return 0; }
static u64 events = 0xe0;
unsigned cuEventCreate(void **event, unsigned flags) { ENTER(" flags=%u", flags); *event = (void *)events++; return 0; }
unsigned cuEventDestroy_v2(void *event) { ENTER(" %llx", (u64)event); return 0; }
unsigned cuEventRecord(void *event, void *stream) { ENTER(" %llx %llx", (u64)event, (u64)stream); return 0; }
unsigned cuEventSynchronize(void *event) { ENTER(" %llx", (u64)event); return 0; }
unsigned cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    ENTER(" %llx %llx", (u64)start, (u64)end);
    *milliseconds = 1.5f;
    return 0;
}
