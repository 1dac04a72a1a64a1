//! The detector's tuning without labels: [`mine`] boxes that a verifier stands by, [`fit`] the detector
//! to them (method.md 5 and 6). [`record`] is what both know of a picture; [`rooms`] gives pictures and
//! questions where one has none.

pub mod fit;
pub mod mine;
pub mod record;
pub mod rooms;
