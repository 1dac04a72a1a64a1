//! The parent's side of a start: lets the new Python's start-up calls go on until it is ready, then
//! closes the door for good. [`super::jail`] says why that holds.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// The door that a worker's start-up calls come through. Dropping it closes the door: from then on the
/// calls fail.
pub(in crate::program) struct Door {
    listener: OwnedFd,
    /// The worker has run its one executable.
    ran: bool,
}

/// Takes the byte that a worker sends first, with the door if its kernel gave it one.
pub(in crate::program) fn take_door(link: &UnixStream) -> io::Result<Option<Door>> {
    let mut byte = [0u8; 1];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = [0u64; 4];
    // SAFETY: all zeros is a valid empty message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the message and all that it points to live until the call returns. Other threads may start
    // processes meanwhile, which must not inherit the listener.
    match unsafe { libc::recvmsg(link.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC) } {
        1 => {}
        0 => return Err(io::ErrorKind::UnexpectedEof.into()),
        _ => return Err(io::Error::last_os_error()),
    }
    // SAFETY: the kernel has filled the header in; CMSG_FIRSTHDR gives null where there is none, and a
    // header of this type holds at least one descriptor, which is new and owned by nothing else.
    let fd = unsafe {
        let header = libc::CMSG_FIRSTHDR(&message);
        if header.is_null()
            || (*header).cmsg_level != libc::SOL_SOCKET
            || (*header).cmsg_type != libc::SCM_RIGHTS
        {
            return Ok(None);
        }
        libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned()
    };
    // SAFETY: as above.
    Ok(Some(Door { listener: unsafe { OwnedFd::from_raw_fd(fd) }, ran: false }))
}

impl Door {
    /// Lets start-up calls go on until there is something to read from the worker.
    ///
    /// # Errors
    /// If the worker ends or the deadline passes before it says anything.
    pub fn keep(&mut self, link: &UnixStream, deadline: Instant) -> io::Result<()> {
        loop {
            let watch = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let mut both = [watch(self.listener.as_raw_fd()), watch(link.as_raw_fd())];
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            // SAFETY: a pointer to two entries, and their number.
            let ready = unsafe { libc::poll(both.as_mut_ptr(), 2, i32::try_from(left).unwrap_or(i32::MAX)) };
            if ready < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
            if ready == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if both[0].revents & libc::POLLIN != 0 {
                self.answer()?;
            } else if both[1].revents != 0 {
                // A word, or the end of the worker: reading tells which.
                return Ok(());
            } else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Answers one call. One `execve` goes on, no second one.
    fn answer(&mut self) -> io::Result<()> {
        let listener = self.listener.as_raw_fd();
        let gone = |error: io::Error| match error.raw_os_error() {
            // The caller was killed, or interrupted and asks again.
            Some(libc::ENOENT | libc::EINTR) => Ok(()),
            _ => Err(error),
        };
        // SAFETY: all zeros is valid for both, and what the kernel asks for before it fills the first.
        let (mut asked, mut reply): (libc::seccomp_notif, libc::seccomp_notif_resp) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        // SAFETY: the request goes with a pointer to such a struct.
        if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &mut asked) } != 0 {
            return gone(io::Error::last_os_error());
        }
        reply.id = asked.id;
        let runs = i64::from(asked.data.nr) == libc::SYS_execve;
        if runs && self.ran {
            reply.error = -libc::EPERM;
        } else {
            // Letting a call go on after having looked at its arguments would be no check, as they may be
            // changed meanwhile; nothing here looks at any, and no program has been sent yet.
            reply.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32;
        }
        self.ran |= runs;
        // SAFETY: as above.
        if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &mut reply) } != 0 {
            return gone(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Allows a process that much address space beyond what it has now: what its program may take.
pub(in crate::program) fn limit_memory(process: u32, bytes: u64) -> io::Result<()> {
    let mut text = String::new();
    File::open(format!("/proc/{process}/statm"))?.read_to_string(&mut text)?;
    let pages: u64 = text
        .split_whitespace()
        .next()
        .and_then(|n| n.parse().ok())
        .ok_or_else(|| io::Error::other("no size in /proc"))?;
    // SAFETY: takes an integer.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(4096) as u64;
    let most = (pages * page + bytes) as libc::rlim_t;
    let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
    // SAFETY: `limit` outlives the call, and no old limit is asked for.
    let rc = unsafe { libc::prlimit(process as i32, libc::RLIMIT_AS, &limit, std::ptr::null_mut()) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
