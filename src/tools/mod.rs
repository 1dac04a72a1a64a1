//! The tools that a program may call (three, and two of an extended set), stub, mock and real, behind one trait
//! ([`Tools`](crate::sight::Tools)); and what else looks at a picture or draws into it.

pub mod draw;
pub mod familiar;
pub mod mock;
pub mod real;
pub mod stub;
