/* An NVML that knows the fabric structures up to KNOWS, written from nvml.h, and one GPU,
 * of whose links to others it says NVLINK and P2P. */
#include "fake.h"

static int sessions;
static unsigned long long current(void) { return sessions; }

struct v1 { unsigned char uuid[16]; unsigned status, clique; unsigned char state; };
struct v2 { unsigned version; unsigned char uuid[16]; unsigned status, clique; unsigned char state; unsigned health; };
struct v3 { unsigned version; unsigned char uuid[16]; unsigned status, clique; unsigned char state; unsigned health; unsigned char summary; };

/* The version is a clique of its own, so that the caller sees which structure was answered. */
#define ANSWER(info, n)                           \
    do {                                          \
        memset((info)->uuid, 0x6b, 16);           \
        (info)->status = 15;                      \
        (info)->clique = n;                       \
        (info)->state = 3;                        \
    } while (0)

unsigned nvmlInit_v2(void) { ENTER(""); sessions++; return 0; }
unsigned nvmlShutdown(void) { ENTER(""); sessions--; return 0; }
unsigned nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **device) { ENTER(" %s", id); *device = (void *)0xd; return 0; }
unsigned nvmlDeviceGetHandleByUUID(const char *id, void **device) { ENTER(" %s", id); *device = (void *)0xe; return 0; }
unsigned nvmlDeviceGetP2PStatus(void *device, void *peer, unsigned capability, unsigned *status) { ENTER(" %p %p %u", device, peer, capability); *status = capability == 2 ? NVLINK : P2P; return 0; }
unsigned nvmlDeviceGetGpuFabricInfo(void *device, struct v1 *info) { ENTER(" %p", device); ANSWER(info, 1); return 0; }
unsigned nvmlDeviceGetGpuFabricInfoV(void *device, unsigned *version) {
    ENTER(" %p %x", device, *version);
    if (KNOWS >= 3 && *version == (sizeof(struct v3) | 3 << 24)) {
        struct v3 *info = (struct v3 *)version;
        ANSWER(info, 3);
        info->health = 7;
        info->summary = 1;
        return 0;
    }
    if (KNOWS >= 2 && *version == (sizeof(struct v2) | 2 << 24)) {
        struct v2 *info = (struct v2 *)version;
        ANSWER(info, 2);
        info->health = 7;
        return 0;
    }
    return 25;
}
