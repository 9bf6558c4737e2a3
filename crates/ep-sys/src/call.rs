//! The names of driver calls. One variant per method of [`Driver`](crate::Driver): errors, the
//! simulator's journal and its fault points all speak of calls by this type.

use std::fmt;

macro_rules! calls {
    ($($variant:ident => $name:literal,)*) => {
        /// One driver entry point.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum Call {
            $(#[doc = concat!("`", $name, "`")] $variant,)*
        }

        impl Call {
            /// Every call, in declaration order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The entry point's name as the vendor spells it.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }
    };
}

calls! {
    Load => "dlopen",
    Init => "cuInit",
    DeviceCount => "cuDeviceGetCount",
    DeviceInfo => "cuDeviceGetAttribute",
    ContextRetain => "cuDevicePrimaryCtxRetain",
    ContextSet => "cuCtxSetCurrent",
    FabricInfo => "nvmlDeviceGetGpuFabricInfo",
    CanAccessPeer => "cuDeviceCanAccessPeer",
    EnablePeerAccess => "cuCtxEnablePeerAccess",
    MemGranularity => "cuMemGetAllocationGranularity",
    MemCreate => "cuMemCreate",
    MemRelease => "cuMemRelease",
    MemReserve => "cuMemAddressReserve",
    MemAddressFree => "cuMemAddressFree",
    MemMap => "cuMemMap",
    MemUnmap => "cuMemUnmap",
    MemSetAccess => "cuMemSetAccess",
    MemExport => "cuMemExportToShareableHandle",
    MemImport => "cuMemImportFromShareableHandle",
    MemAlloc => "cuMemAlloc",
    MemFree => "cuMemFree",
    MemInfo => "cuMemGetInfo",
    IpcGetHandle => "cuIpcGetMemHandle",
    IpcOpen => "cuIpcOpenMemHandle",
    IpcClose => "cuIpcCloseMemHandle",
    HostAlloc => "cuMemHostAlloc",
    HostFree => "cuMemFreeHost",
    HostLoad => "host load",
    Fill => "cuMemsetD8Async",
    CopyToDevice => "cuMemcpyHtoD",
    CopyToHost => "cuMemcpyDtoH",
    CopyOnDevice => "cuMemcpyDtoDAsync",
    StreamCreate => "cuStreamCreate",
    StreamDestroy => "cuStreamDestroy",
    StreamSynchronize => "cuStreamSynchronize",
    StreamWaitEvent => "cuStreamWaitEvent",
    EventCreate => "cuEventCreate",
    EventDestroy => "cuEventDestroy",
    EventRecord => "cuEventRecord",
    EventSynchronize => "cuEventSynchronize",
    EventElapsed => "cuEventElapsedTime",
    PeerLinks => "nvmlDeviceGetP2PStatus",
}

impl Call {
    /// Whether it is NVML's, whose statuses are other than the driver's.
    pub fn is_of_nvml(self) -> bool {
        matches!(self, Self::FabricInfo | Self::PeerLinks)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
