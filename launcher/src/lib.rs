//! What the command line and the workers share (places, events, exit codes), and what the command line is made of:
//! prepared stages, supervision of workers, evaluations, reports.

pub mod attempts;
pub mod bounded;
pub mod checkpoint;
pub mod doctor;
pub mod evaluation;
pub mod events;
pub mod exit;
pub mod families;
pub mod fewshot;
pub mod files;
pub mod gpus;
pub mod history;
pub mod hostlist;
pub mod inspection;
pub mod measurement;
pub mod place;
pub mod planned;
pub mod pulse;
pub mod rendezvous;
pub mod report;
pub mod sampling;
pub mod scaling;
pub mod stages;
pub mod statistics;
pub mod status;
pub mod submit;
pub mod supervise;
pub mod text;
pub mod textmetrics;
pub mod view;
pub mod wall_time;
pub mod worker;
pub mod writing;
