//! Data from outside: boxes as ODVG and COCO files, pictures with questions.

pub mod odvg;
pub mod queries;
