//! The ranks that take part in a step, and the table entries they stand for.

use std::time::Instant;

use crate::exchange::{Exchange, Step};
use crate::wire::Record;
use crate::{Error, Result};

/// An exchange whose ranks stand for entries of a table.
///
/// Usually exchange rank and table rank are the same ([`whole`](Self::whole)). After a membership
/// change the remaining ranks meet in a smaller exchange, with ranks counted anew, and keep their
/// table entries ([`members`](Self::members)).
#[derive(Debug)]
pub struct Group<'a> {
    exchange: &'a dyn Exchange,
    /// The table rank of each exchange rank.
    members: Vec<u32>,
    num_ranks: u32,
}

impl<'a> Group<'a> {
    /// Every rank of the exchange, under its own number.
    pub fn whole(exchange: &'a dyn Exchange) -> Self {
        Self {
            exchange,
            members: (0..exchange.size()).collect(),
            num_ranks: exchange.size(),
        }
    }

    /// Part of `num_ranks` ranks: rank `i` of the exchange is rank `members[i]`.
    pub fn members(exchange: &'a dyn Exchange, num_ranks: u32, members: &[u32]) -> Result<Self> {
        let distinct = members
            .iter()
            .enumerate()
            .all(|(i, rank)| *rank < num_ranks && !members[..i].contains(rank));
        if !distinct || members.len() != exchange.size() as usize {
            return Err(Error::BadMembers {
                members: members.to_vec(),
                size: exchange.size(),
                num_ranks,
            });
        }
        Ok(Self {
            exchange,
            members: members.to_vec(),
            num_ranks,
        })
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.name(self.exchange.rank())
    }

    /// Entries of the table: ranks, whether they are members or not.
    pub fn num_ranks(&self) -> u32 {
        self.num_ranks
    }

    /// The members' ranks, in the exchange's order.
    pub fn ranks(&self) -> &[u32] {
        &self.members
    }

    /// The exchange.
    pub fn exchange(&self) -> &'a dyn Exchange {
        self.exchange
    }

    /// Gives every member's record to every member, checked: each is whole, of its sender, of the
    /// generation of `record`, and of one configuration. In the order of [`ranks`](Self::ranks).
    pub fn gather(&self, step: Step, record: &Record, deadline: Instant) -> Result<Vec<Record>> {
        let records = self
            .all_gather(step, &record.encode(), deadline)?
            .iter()
            .zip(&self.members)
            .map(|(bytes, &rank)| {
                Record::decode_from(bytes, rank, record.generation)
                    .map_err(|source| Error::Record { rank, source })
            })
            .collect::<Result<Vec<_>>>()?;
        let differs = |first: &Record| records.iter().find(|record| record.digest != first.digest);
        match records
            .first()
            .and_then(|first| Some((first, differs(first)?)))
        {
            None => Ok(records),
            Some((first, other)) => Err(Error::Configuration {
                rank: other.rank,
                reference: first.rank,
                expected: first.digest,
                actual: other.digest,
            }),
        }
    }

    /// Returns when every member has arrived.
    pub fn barrier(&self, step: Step, deadline: Instant) -> Result<()> {
        self.all_gather(step, &[], deadline).map(drop)
    }

    /// The exchange's all-gather, with faults told in table ranks.
    pub(crate) fn all_gather(
        &self,
        step: Step,
        record: &[u8],
        deadline: Instant,
    ) -> Result<Vec<Vec<u8>>> {
        self.named(self.exchange.all_gather(step, record, deadline))
    }

    /// The same outcome, with faults told in table ranks.
    pub(crate) fn named<T>(&self, outcome: Result<T>) -> Result<T> {
        outcome.map_err(|error| match error {
            Error::Exchange(mut fault) => {
                for rank in &mut fault.ranks {
                    *rank = self.name(*rank);
                }
                Error::Exchange(fault)
            }
            Error::Record { rank, source } => Error::Record {
                rank: self.name(rank),
                source,
            },
            other => other,
        })
    }

    fn name(&self, exchange_rank: u32) -> u32 {
        let member = self.members.get(exchange_rank as usize);
        member.copied().unwrap_or(exchange_rank)
    }
}
