//! A stream socket that carries frames, without ever blocking.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::frame::{HEADER_BYTES, Header};
use super::{Cause, Fault};

/// One end of a connection to another rank.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    header: [u8; HEADER_BYTES],
    admitted: Option<Header>,
    payload: Vec<u8>,
    /// Bytes of the frame that has begun to come, header included.
    got: usize,
}

impl Link {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            header: [0; HEADER_BYTES],
            admitted: None,
            payload: Vec::new(),
            got: 0,
        }
    }

    /// Takes what has come. `admit` judges a header before anything is set aside for its payload,
    /// and so bounds the payload. Reads nothing beyond the frame.
    pub(super) fn receive(
        &mut self,
        admit: impl FnOnce(&Header) -> Result<(), Cause>,
    ) -> Result<Option<(Header, Vec<u8>)>, Cause> {
        if self.admitted.is_none() {
            if !self.fill()? {
                return Ok(None);
            }
            let header = Header::decode(&self.header)?;
            admit(&header)?;
            self.payload.resize(header.length as usize, 0);
            self.admitted = Some(header);
        }
        if !self.fill()? {
            return Ok(None);
        }
        self.got = 0;
        Ok(self
            .admitted
            .take()
            .map(|header| (header, std::mem::take(&mut self.payload))))
    }

    /// Sends from `bytes[*sent..]` what the socket takes now, and advances `sent`.
    pub(super) fn send(&mut self, bytes: &[u8], sent: &mut usize) -> Result<(), Cause> {
        while *sent < bytes.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &bytes[*sent..], flags) {
                Ok(taken) => *sent += taken,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(errno) => return Err(lost(errno)),
            }
        }
        Ok(())
    }

    /// Sends a last frame as far as the socket takes it, and ends the connection: nothing follows. So
    /// where a frame was cut short, the connection is ended without another.
    pub(super) fn finish(&mut self, frame: &[u8]) {
        // The peer may be gone already; then there is nobody to tell.
        let _ = self.send(frame, &mut 0);
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
    }

    /// What is wrong if nothing more comes: a frame cut short, or nothing.
    pub(super) fn truncated(&self) -> Option<Cause> {
        (self.got > 0).then(|| Cause::Truncated {
            got: self.got as u64,
            expected: (HEADER_BYTES + self.payload.len()) as u64,
        })
    }

    /// The rank that the header named, once it has come.
    pub(super) fn claimed_rank(&self) -> Option<u32> {
        (self.got >= HEADER_BYTES).then(|| Header::claimed_rank(&self.header))
    }

    /// Reads into the header, or once that is admitted the payload. True when it is full.
    fn fill(&mut self) -> Result<bool, Cause> {
        loop {
            let room = match self.admitted {
                None => &mut self.header[self.got..],
                Some(_) => &mut self.payload[self.got - HEADER_BYTES..],
            };
            if room.is_empty() {
                return Ok(true);
            }
            match rustix::net::recv(&self.socket, room, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    return Err(self.truncated().unwrap_or(Cause::Lost { errno: None }));
                }
                Ok((taken, _)) => self.got += taken,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(errno) => return Err(self.truncated().unwrap_or(lost(errno))),
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Waits until one of the descriptors is ready or `until` has come.
pub(super) fn wait(fds: &mut [PollFd<'_>], until: Instant) -> Result<(), Errno> {
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match rustix::event::poll(fds, Some(&timeout)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The fault that an abort frame tells, or that it is none.
pub(super) fn told(payload: &[u8], otherwise: impl FnOnce() -> Fault) -> Fault {
    Fault::decode(payload).unwrap_or_else(otherwise)
}

fn lost(errno: Errno) -> Cause {
    Cause::Lost {
        errno: Some(errno.raw_os_error()),
    }
}
