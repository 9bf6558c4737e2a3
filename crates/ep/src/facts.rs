//! What a rank tells the others before memory is chosen: its configuration and what its device can
//! do.
//!
//! It travels in the caller's part of a handle record, which adds rank, version and checksum.

use ep_alloc::{
    BackendKind, Choice, Failure, PerBackend, RankFacts, Trial, fabric_state_from_code,
    fabric_state_to_code,
};
use ep_peers::wire::{FACTS_BYTES, Facts, Handle, Identity, Record};
use ep_sys::{Bytes16, DevicePtr, FabricInfo};

use crate::{Config, Error};

/// Version of the encoding.
const VERSION: u32 = 1;
const NAME_BYTES: usize = 64;
const PCI_BYTES: usize = 32;

/// What a rank tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hello {
    /// Whether the rank can go on; if not, it has an error of its own.
    pub(crate) is_ready: bool,
    pub(crate) config: Config,
    /// The kernels' name, and the version of their contract.
    pub(crate) kernels: (String, u32),
    pub(crate) facts: RankFacts,
}

impl Hello {
    /// The record of this rank.
    pub(crate) fn encode(&self, generation: u64) -> [u8; Record::BYTES] {
        let facts = &self.facts;
        let mut w = Writer::default();
        w.u32(VERSION);
        w.u32(u32::from(self.is_ready));
        for (_, value) in self.config.fields() {
            w.u32(value);
        }
        w.text::<16>(&self.kernels.0);
        w.u32(self.kernels.1);
        w.text::<NAME_BYTES>(&facts.host_name);
        w.text::<PCI_BYTES>(&facts.pci_bus_id);
        match &facts.fabric {
            Ok(info) => {
                w.u64(0);
                w.u32(fabric_state_to_code(info.state));
                w.u32(info.status);
                w.bytes(&info.cluster_uuid.0);
                w.u32(info.clique_id);
            }
            Err(failure) => w.u64(failure.to_code()),
        }
        w.u32(u32::from(facts.imex_channel));
        w.u32(facts.rdma_nics);
        for kind in BackendKind::ALL {
            w.u64(facts.trials[kind].to_code());
            w.u64(facts.granularity[kind]);
        }
        w.u32(facts.choice.to_code().into());
        Record {
            rank: facts.rank,
            generation,
            identity: Identity {
                host: facts.host_id,
                process: facts.process,
                gpu: facts.gpu_uuid,
                clique: facts.clique(),
            },
            bytes: 0,
            granularity: 0,
            base: DevicePtr::NULL,
            handle: Handle::None(None),
            digest: 0,
            // The texts are cut to what fits, so this is never too long.
            facts: Facts::new(&w.0).unwrap_or_default(),
        }
        .encode()
    }

    /// What `peer` told in these bytes.
    pub(crate) fn decode(
        bytes: &[u8],
        rank: u32,
        peer: u32,
        generation: u64,
    ) -> Result<Self, Error> {
        let record =
            Record::decode_from(bytes, peer, generation).map_err(|source| Error::Group {
                rank,
                source: ep_peers::Error::Record { rank: peer, source },
            })?;
        Self::from_record(&record).ok_or(Error::Facts { rank, peer })
    }

    /// What must be the same on every rank, by name.
    fn configuration(&self) -> Vec<(&'static str, String)> {
        let fields = self.config.fields().into_iter();
        let (name, version) = &self.kernels;
        fields
            .map(|(field, value)| (field, value.to_string()))
            .chain([("kernels", format!("{name} of version {version}"))])
            .collect()
    }

    fn from_record(record: &Record) -> Option<Self> {
        let mut r = Reader(record.facts.as_bytes());
        if r.u32()? != VERSION {
            return None;
        }
        let is_ready = r.u32()? != 0;
        let config = Config {
            num_experts: r.u32()?,
            hidden: r.u32()?,
            max_tokens: r.u32()?,
            max_top_k: r.u32()?,
            slots: r.u32()?,
            sends_in_flight: r.u32()?,
        };
        let kernels = (r.text()?, r.u32()?);
        let host_name = r.text()?;
        let pci_bus_id = r.text()?;
        let fabric = match r.u64()? {
            0 => Ok(FabricInfo {
                state: fabric_state_from_code(r.u32()?),
                status: r.u32()?,
                cluster_uuid: Bytes16(*r.bytes()?),
                clique_id: r.u32()?,
            }),
            code => Err(Failure::from_code(code)?),
        };
        let imex_channel = r.u32()? != 0;
        let rdma_nics = r.u32()?;
        let mut trials = PerBackend::default();
        let mut granularity = PerBackend::default();
        for kind in BackendKind::ALL {
            trials[kind] = Trial::from_code(r.u64()?)?;
            granularity[kind] = r.u64()?;
        }
        let choice = Choice::from_code(u8::try_from(r.u32()?).ok()?)?;
        r.0.is_empty().then_some(Self {
            is_ready,
            config,
            kernels,
            facts: RankFacts {
                rank: record.rank,
                host_id: record.identity.host,
                host_name,
                process: record.identity.process,
                gpu_uuid: record.identity.gpu,
                pci_bus_id,
                fabric,
                imex_channel,
                rdma_nics,
                trials,
                granularity,
                choice,
            },
        })
    }
}

/// Fails if a rank cannot go on, or is configured unlike the first.
pub(crate) fn compare(rank: u32, hellos: &[Hello]) -> Result<(), Error> {
    if let Some(failed) = hellos.iter().find(|hello| !hello.is_ready) {
        return Err(Error::Peer {
            rank,
            peer: failed.facts.rank,
            step: "settings",
            failure: None,
        });
    }
    let Some((reference, others)) = hellos.split_first() else {
        return Ok(());
    };
    let expected = reference.configuration();
    for other in others {
        let differences = expected.iter().zip(other.configuration());
        for ((field, expected), (_, got)) in differences {
            if *expected != got {
                return Err(Error::Mismatch {
                    field,
                    rank: other.facts.rank,
                    got,
                    reference: reference.facts.rank,
                    expected: expected.clone(),
                });
            }
        }
    }
    Ok(())
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// A text of at most `MAX` bytes; what exceeds that is cut off.
    fn text<const MAX: usize>(&mut self, text: &str) {
        const { assert!(MAX <= FACTS_BYTES / 4) };
        let text = &text[..text.floor_char_boundary(MAX)];
        self.u32(text.len() as u32);
        self.bytes(text.as_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes<const N: usize>(&mut self) -> Option<&'a [u8; N]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(|bytes| u32::from_le_bytes(*bytes))
    }

    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(|bytes| u64::from_le_bytes(*bytes))
    }

    fn text(&mut self) -> Option<String> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (text, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        String::from_utf8(text.to_vec()).ok()
    }
}

#[cfg(test)]
mod tests {
    use ep_alloc::Untried;
    use ep_sys::{Call, FabricState};

    use super::*;

    fn hello(rank: u32) -> Hello {
        Hello {
            is_ready: true,
            config: Config::new(7168, 256, 128, 8),
            kernels: (String::from("host"), 1),
            facts: RankFacts {
                rank,
                host_id: Bytes16([1; 16]),
                host_name: "n".repeat(NAME_BYTES),
                process: Bytes16([2; 16]),
                gpu_uuid: Bytes16([3; 16]),
                pci_bus_id: "0".repeat(PCI_BYTES),
                fabric: Ok(FabricInfo {
                    state: FabricState::Completed,
                    status: 3,
                    cluster_uuid: Bytes16([4; 16]),
                    clique_id: 5,
                }),
                imex_channel: true,
                rdma_nics: 8,
                trials: PerBackend {
                    fabric: Trial::Refused(Failure {
                        call: Call::MemCreate,
                        cause: ep_alloc::Cause::Status(ep_sys::Status::NOT_PERMITTED),
                    }),
                    posix_fd: Trial::NotTried(Untried::PosixFdAttribute),
                    malloc: Trial::Ok { gdr: false },
                },
                granularity: PerBackend::from_fn(|kind| kind.to_code().into()),
                choice: Choice::Force(BackendKind::PosixFd),
            },
        }
    }

    #[test]
    fn what_is_told_is_heard() {
        let mut told = hello(3);
        assert_eq!(Hello::decode(&told.encode(7), 0, 3, 7).unwrap(), told);
        told.facts.fabric = Err(Failure {
            call: Call::FabricInfo,
            cause: ep_alloc::Cause::Nvml(999),
        });
        assert_eq!(Hello::decode(&told.encode(7), 0, 3, 7).unwrap(), told);
    }

    #[test]
    fn what_is_foreign_is_refused() {
        let bytes = hello(3).encode(7);
        let heard = |peer, generation| Hello::decode(&bytes, 0, peer, generation);
        assert!(matches!(heard(2, 7), Err(Error::Group { .. })));
        assert!(matches!(heard(3, 8), Err(Error::Group { .. })));

        let mut record = Record::decode(&bytes).unwrap();
        let facts = record.facts.as_bytes().to_vec();
        for cut in 0..facts.len() {
            record.facts = Facts::new(&facts[..cut]).unwrap();
            assert_eq!(Hello::from_record(&record), None, "{cut} bytes");
        }
    }

    #[test]
    fn a_difference_names_field_and_ranks() {
        let mut hellos = [hello(0), hello(1), hello(2)];
        assert!(compare(1, &hellos).is_ok());
        hellos[2].kernels.0 = String::from("cuda");
        hellos[2].config.max_top_k = 9;
        assert_eq!(
            compare(1, &hellos).unwrap_err().to_string(),
            "rank 2 has max_top_k 9, rank 0 has 8; give every rank the same configuration"
        );
        hellos[1].is_ready = false;
        assert!(matches!(
            compare(0, &hellos),
            Err(Error::Peer { peer: 1, .. })
        ));
    }
}
