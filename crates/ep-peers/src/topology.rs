//! Which ranks share a process, a host, an NVLink clique: by what they say of themselves, never by
//! their numbers.

use std::hash::Hash;
use std::sync::OnceLock;
use std::{io, process};

use ep_sys::Bytes16;
use rustix::rand::GetRandomFlags;

use crate::wire::Identity;

/// What tells this process from all others, for [`Identity::process`]: random, the same on every
/// call, and another in a child made by `fork`.
pub fn process_token() -> io::Result<Bytes16> {
    static RANDOM: OnceLock<[u8; 16]> = OnceLock::new();
    let mut token = match RANDOM.get() {
        Some(token) => *token,
        None => {
            let mut token = [0; 16];
            // Requests of up to 256 bytes are never cut short.
            rustix::rand::getrandom(&mut token, GetRandomFlags::empty())?;
            *RANDOM.get_or_init(|| token)
        }
    };
    for (byte, id) in token.iter_mut().zip(process::id().to_le_bytes()) {
        *byte ^= id;
    }
    Ok(Bytes16(token))
}

/// Where the ranks of a group run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// By rank; none for a rank that is not a member.
    identities: Vec<Option<Identity>>,
}

/// How near two ranks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Nearness {
    /// They are one rank.
    Own,
    /// Threads of one process.
    Process,
    /// Processes of one host.
    Host,
    /// On different hosts.
    Remote,
}

impl Topology {
    /// The topology of these ranks, by rank; `None` for those that are not members.
    pub fn new(identities: Vec<Option<Identity>>) -> Self {
        Self { identities }
    }

    /// Where a member runs.
    pub fn identity(&self, rank: u32) -> Option<&Identity> {
        self.identities.get(rank as usize)?.as_ref()
    }

    /// How near two members are. An identity of zeros is unknown, and equals no other.
    pub fn nearness(&self, a: u32, b: u32) -> Option<Nearness> {
        let (one, other) = (self.identity(a)?, self.identity(b)?);
        Some(if a == b {
            Nearness::Own
        } else if one.host != other.host || one.host.is_zero() {
            Nearness::Remote
        } else if one.process != other.process || one.process.is_zero() {
            Nearness::Host
        } else {
            Nearness::Process
        })
    }

    /// Whether two members are in different NVLink cliques: both are in one, and not the same.
    pub fn in_different_cliques(&self, a: u32, b: u32) -> bool {
        let clique = |rank| self.identity(rank)?.clique;
        matches!((clique(a), clique(b)), (Some(one), Some(other)) if one != other)
    }

    /// The members by host, in order of their lowest ranks. A rank whose host is unknown is alone.
    pub fn hosts(&self) -> Vec<Vec<u32>> {
        self.grouped(|identity| Some(identity.host).filter(|host| !host.is_zero()))
    }

    /// The members by process, in order of their lowest ranks.
    pub fn processes(&self) -> Vec<Vec<u32>> {
        self.grouped(|identity| {
            let key = (identity.host, identity.process);
            Some(key).filter(|(host, process)| !host.is_zero() && !process.is_zero())
        })
    }

    /// The members by NVLink clique, in order of their lowest ranks. A rank in none is alone.
    pub fn cliques(&self) -> Vec<Vec<u32>> {
        self.grouped(|identity| identity.clique)
    }

    /// Members with the same key together; those without a key alone.
    fn grouped<K: PartialEq + Hash>(&self, key: impl Fn(&Identity) -> Option<K>) -> Vec<Vec<u32>> {
        let mut groups: Vec<(Option<K>, Vec<u32>)> = Vec::new();
        for (rank, identity) in (0..).zip(&self.identities) {
            let Some(identity) = identity else { continue };
            let key = key(identity);
            let known = groups
                .iter_mut()
                .find(|(group, _)| key.is_some() && *group == key);
            match known {
                Some((_, ranks)) => ranks.push(rank),
                None => groups.push((key, vec![rank])),
            }
        }
        groups.into_iter().map(|(_, ranks)| ranks).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(host: u8, process: u8, clique: Option<(u8, u32)>) -> Option<Identity> {
        Some(Identity {
            host: Bytes16([host; 16]),
            process: Bytes16([process; 16]),
            gpu: Bytes16::ZERO,
            clique: clique.map(|(cluster, id)| (Bytes16([cluster; 16]), id)),
        })
    }

    #[test]
    fn nodes_may_hold_different_numbers_of_ranks_in_any_order() {
        let topology = Topology::new(vec![
            identity(1, 1, None),
            identity(2, 1, None),
            identity(1, 2, None),
            None,
            identity(1, 1, None),
        ]);
        assert_eq!(topology.hosts(), [vec![0, 2, 4], vec![1]]);
        // A process token means nothing on another host: processes 1 of both are two.
        assert_eq!(topology.processes(), [vec![0, 4], vec![1], vec![2]]);
        assert_eq!(topology.nearness(0, 0), Some(Nearness::Own));
        assert_eq!(topology.nearness(0, 4), Some(Nearness::Process));
        assert_eq!(topology.nearness(0, 2), Some(Nearness::Host));
        assert_eq!(topology.nearness(0, 1), Some(Nearness::Remote));
        assert_eq!(topology.nearness(0, 3), None);
        assert_eq!(topology.nearness(0, 9), None);
    }

    #[test]
    fn a_process_has_one_token() {
        let token = process_token().unwrap();
        let elsewhere = std::thread::spawn(|| process_token().unwrap());
        assert_eq!(elsewhere.join().unwrap(), token);
        assert!(!token.is_zero());
    }

    #[test]
    fn unknown_identities_equal_no_other() {
        let topology = Topology::new(vec![
            identity(0, 0, None),
            identity(0, 0, None),
            identity(3, 0, None),
            identity(3, 0, None),
        ]);
        assert_eq!(topology.nearness(0, 1), Some(Nearness::Remote));
        assert_eq!(topology.nearness(2, 3), Some(Nearness::Host));
        assert_eq!(topology.hosts(), [vec![0], vec![1], vec![2, 3]]);
        assert_eq!(topology.processes(), [[0], [1], [2], [3]]);
    }

    #[test]
    fn a_clique_is_a_cluster_and_a_number() {
        let topology = Topology::new(vec![
            identity(1, 1, Some((7, 1))),
            identity(2, 1, Some((8, 1))),
            identity(3, 1, Some((7, 1))),
            identity(4, 1, None),
        ]);
        assert_eq!(topology.cliques(), [vec![0, 2], vec![1], vec![3]]);
        assert!(topology.in_different_cliques(0, 1));
        assert!(!topology.in_different_cliques(0, 2));
        assert!(
            !topology.in_different_cliques(0, 3),
            "an unknown clique may be the same"
        );
    }
}
