//! Where there is no way to confine a worker there is none: starting one is the error.

use std::io;
use std::path::Path;
use std::time::Duration;

use super::sandbox::{Budget, SandboxError};
use super::{Layers, Limits, Python, wire::Plain};

pub(super) struct Worker {
    pub age: Duration,
}

impl Worker {
    pub fn embedded(_: Option<&Path>, _: &Limits) -> Result<(Self, Layers), SandboxError> {
        Err(SandboxError::Platform)
    }
    pub fn python(_: Option<&Path>, _: &Limits, _: &Python) -> Result<(Self, Layers), SandboxError> {
        Err(SandboxError::Platform)
    }
    pub fn id(&self) -> u32 {
        0
    }
    pub fn is_alive(&mut self) -> bool {
        false
    }
    pub fn send(&mut self, _: &Plain, _: &mut Budget) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    pub fn receive(&mut self, _: &Limits, _: &mut Budget) -> io::Result<Plain> {
        Err(io::ErrorKind::Unsupported.into())
    }
    pub fn finish(self) -> Option<i32> {
        None
    }
}
