//! What the command line and the workers share: places, events, exit codes.

pub mod events;
pub mod exit;
