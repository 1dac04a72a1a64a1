//! The child's side: a worker process that locks itself in and then becomes a Python.
//!
//! The order is what makes it hold across the exec:
//! 1. descriptors, environment, death with the parent, resource limits and Landlock, as for the embedded
//!    interpreter; but Landlock lets the files be read that Python starts from, and nothing else. The
//!    rules outlive the exec.
//! 2. A first filter of system calls hands the calls of [`START_UP`] (opening files, running one, mapping
//!    code, …) to a listener and lets the rest through. The listener's descriptor goes to the parent
//!    (`start.rs`) and is closed here.
//! 3. A second filter allows [`jail::OWN_CALLS`] and [`START_UP`] and lets all else fail: no network, no
//!    processes, no signals, from here on, whatever happens. Of two filters the stricter verdict counts.
//! 4. `execve` of Python. The parent lets start-up calls go on, and only this one `execve`, until Python
//!    says that it has imported all it needs. Then it closes the listener, and the kernel answers every
//!    call of [`START_UP`] with ENOSYS. Nothing can open the listener again: this is a ratchet, and it
//!    needs no help from Python. Only then does the parent send the program.
//!
//! So a program, whatever it does to the interpreter around it (`ctypes` or the like included), can read
//! and write its pipe, allocate memory, and end. It cannot open, list, run, fork, connect or signal
//! anything, nor make memory executable.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::{BESIDE, Python, modules};
use crate::program::jail::{self, Layers, Readable};
use crate::program::wire::{self, Plain};
use crate::program::{desugar, host, worker};

/// The loader's list of libraries; it is read before Python runs.
const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// Numerical libraries start threads unless told not to, and there are none in the jail.
pub(super) const ONE_THREAD: [(&str, &str); 3] =
    [("OPENBLAS_NUM_THREADS", "1"), ("OMP_NUM_THREADS", "1"), ("MKL_NUM_THREADS", "1")];

/// Turns this process into a jailed Python. Returns only where that fails; what the parent has to know
/// of it, it has been told.
pub(in crate::program) fn become_python(
    parent: u32,
    address_space: u64,
    cpu: u64,
    python: &str,
) -> io::Result<Infallible> {
    let python: Python = serde_json::from_str(python)?;
    let command = Command::new(&python)?;
    let code = python.code.iter().map(|p| p.as_path()).chain([LOADER_CACHE.as_ref()]).collect();
    let readable = Readable {
        run: code,
        read: python.trees.iter().map(|p| p.as_path()).collect(),
        list: python.listed.iter().map(|p| p.as_path()).collect(),
    };
    let mut layers = jail::enter_python(address_space, cpu, parent, &readable);
    seal(&mut layers)?;
    let link = std::mem::ManuallyDrop::new(
        // SAFETY: descriptor 0 is the socket to the parent, open for the life of the process; it is not
        // closed here.
        unsafe { File::from_raw_fd(0) },
    );
    wire::send(&mut &*link, &Plain::List(vec![Plain::str("jail"), layers.to_plain()]), 1 << 20)?;
    if !layers.complete() {
        return Err(io::Error::other("the jail is not whole"));
    }
    Err(command.exec())
}

/// All that the exec takes, put together before system calls are few.
struct Command {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Command {
    fn new(python: &Python) -> io::Result<Self> {
        let path = CString::new(python.executable.as_os_str().as_bytes())?;
        // -I would be these and -E, which makes Python ignore PYTHONHASHSEED. There is no other variable
        // to ignore. -P, its third part, is what bootstrap.py's first line does.
        let args = ["-s", "-S", "-B", "-u", "-X", "utf8", "-c", &bootstrap(python)];
        let args = args.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>()?;
        let args = std::iter::once(path.clone()).chain(args).collect();
        // With a fixed seed the order of a set of strings is the same in every run.
        let mut env = vec![CString::new("PYTHONHASHSEED=0")?];
        if python.numpy.is_some() {
            for (name, value) in ONE_THREAD {
                env.push(CString::new(format!("{name}={value}"))?);
            }
        }
        Ok(Self { path, args, env })
    }

    fn exec(&self) -> io::Error {
        let ended = |all: &[CString]| -> Vec<*const libc::c_char> {
            all.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
        };
        let (args, env) = (ended(&self.args), ended(&self.env));
        // SAFETY: a path and two lists of strings, each ended by a null, that outlive the call.
        unsafe { libc::execve(self.path.as_ptr(), args.as_ptr(), env.as_ptr()) };
        io::Error::last_os_error()
    }
}

/// The text that `python -c` is given.
fn bootstrap(python: &Python) -> String {
    let names = serde_json::json!({
        "modules": modules(python.numpy.is_some()),
        "beside": BESIDE,
        "path": python.path,
        "tools": host::SIGNATURES.map(|(tool, _)| tool),
        "refused_modules": desugar::REFUSED_MODULES,
        "refused_attributes": desugar::REFUSED_ATTRIBUTES,
        "refused_names": worker::REFUSED,
        "out_of_memory": monty_types::OOM_EXIT_CODE,
    });
    // JSON of texts, numbers and lists is Python too.
    format!("NAMES = {names}\n{}", include_str!("bootstrap.py"))
}

/// Installs both filters and gives the listener away. The parent gets one byte, with the listener's
/// descriptor where there is one.
fn seal(layers: &mut Layers) -> io::Result<()> {
    let sealed = listener().and_then(|fd| Ok((fd, strict()?)));
    match sealed {
        Ok((listener, strict)) => {
            give(Some(&listener))?;
            // Python must not be able to answer its own calls.
            drop(listener);
            let done = seccompiler::apply_filter(&strict).map_err(|e| e.to_string());
            let detail = "an allow-list of system calls; start-up's close before the program is sent";
            layers.add("seccomp", done.map(|()| detail));
        }
        Err(why) => {
            layers.add("seccomp", Err(why));
            give(None)?;
        }
    }
    Ok(())
}

/// Sends one byte on descriptor 0, and a descriptor with it.
fn give(fd: Option<&OwnedFd>) -> io::Result<()> {
    let mut byte = [0u8; 1];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = [0u64; 4];
    // SAFETY: all zeros is a valid empty message header.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    if let Some(fd) = fd {
        let size = size_of::<libc::c_int>() as u32;
        message.msg_control = control.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN compute from their argument; `control` is aligned for a header
        // and holds one with one descriptor (24 of 32 bytes), so CMSG_FIRSTHDR and CMSG_DATA stay in it.
        unsafe {
            message.msg_controllen = libc::CMSG_SPACE(size) as _;
            let header = libc::CMSG_FIRSTHDR(&message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size) as _;
            libc::CMSG_DATA(header).cast::<libc::c_int>().write_unaligned(fd.as_raw_fd());
        }
    }
    // SAFETY: the message and all that it points to live until the call returns.
    match unsafe { libc::sendmsg(0, &message, 0) } {
        1 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The filter of step 2, and its listener.
fn listener() -> Result<OwnedFd, String> {
    // SAFETY: takes integers only.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(format!("prctl: {}", io::Error::last_os_error()));
    }
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = START_UP.iter().map(|&call| (call, vec![])).collect();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![makes_code().map_err(|e| e.to_string())?]);
    }
    // The crate does not know of listeners: the verdict "ask a tracer" stands for "ask the listener".
    let program = filter(rules, SeccompAction::Trace(0), SeccompAction::Allow)?;
    let mut program: Vec<libc::sock_filter> =
        program.iter().map(|i| libc::sock_filter { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
    let is_return = |i: &libc::sock_filter| u32::from(i.code) == libc::BPF_RET | libc::BPF_K;
    let mut asks = 0;
    for i in program.iter_mut().filter(|i| is_return(i) && i.k == libc::SECCOMP_RET_TRACE) {
        i.k = libc::SECCOMP_RET_USER_NOTIF;
        asks += 1;
    }
    if asks == 0 {
        return Err("the filter asks no listener".to_owned());
    }
    let text = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the kernel copies the filter, which outlives the call.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &text,
        )
    };
    if fd < 0 {
        return Err(format!("no listener: {}", io::Error::last_os_error()));
    }
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// The filter of step 3.
fn strict() -> Result<BpfProgram, String> {
    let mapping = [libc::SYS_mmap, libc::SYS_mprotect];
    let rules = jail::OWN_CALLS.iter().chain(START_UP).chain(&mapping).map(|&call| (call, vec![])).collect();
    filter(rules, SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32))
}

fn filter(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    matched: SeccompAction,
    other: SeccompAction,
) -> Result<BpfProgram, String> {
    let arch = std::env::consts::ARCH.try_into().map_err(|e: seccompiler::BackendError| e.to_string())?;
    SeccompFilter::new(rules, other, matched, arch)
        .and_then(TryInto::try_into)
        .map_err(|e: seccompiler::BackendError| e.to_string())
}

/// Asks for memory that can be executed.
fn makes_code() -> Result<SeccompRule, seccompiler::BackendError> {
    let exec = libc::PROT_EXEC as u64;
    SeccompRule::new(vec![SeccompCondition::new(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(exec),
        exec,
    )?])
}

/// What starting it takes beside these, mapping code included.
const START_UP: &[i64] = &[
    libc::SYS_execve,
    libc::SYS_openat,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_ioctl,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_getrandom,
    libc::SYS_rt_sigaction,
    libc::SYS_set_tid_address,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_prlimit64,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_sched_getaffinity,
    // What older C libraries call for the same on this architecture.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_arch_prctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_lstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_access,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_getdents,
];
