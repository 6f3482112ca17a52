//! Planned against measured: what the planner says of a run's memory and bytes where the run starts, what both turned out to be, and
//! which layers recompute where the plan leaves that to the planner.

use anyhow::{Result, ensure};
use configs::planner::{Besides, Budget, Division, Hardware, Memory, Sizes, Traffic, time};
use configs::{Mix, Plan, Train};
use launcher::place::Place;
use launcher::{planned, text};
use sharding::{Comm, Stage};
use tch::Device;

use crate::memory::{Resident, machine_bytes};
use crate::step::Trainer;

/// Steps after which a run tells how its plan turned out; the first ones' memory has settled by then.
const FIRST_STEPS: u64 = 3;

/// How a run divides training: ZeRO stage, and whether frozen weights are divided.
type Shards = (Stage, bool);

fn division(plan: &Plan, world: usize, (stage, _): Shards) -> Division {
    let zero = Stage::ALL.iter().position(|each| *each == stage).unwrap_or_default();
    Division::of(zero as u8, plan.train.precision, world)
}

/// On the device that the run is on, whatever the config was typed for.
fn train_on(plan: &Plan, device: Device) -> Train {
    Train {
        device: match device {
            Device::Cpu => configs::Device::Cpu,
            _ => configs::Device::Cuda,
        },
        ..plan.train.clone()
    }
}

/// What each layer recomputes: as the plan says, or, where it says `auto`, what costs least of what fits the smallest memory that any
/// rank has. All ranks call it, and choose alike.
///
/// # Errors
/// When the plan names more layers than there are, or nothing fits.
pub fn recomputation(plan: &Plan, sizes: &Sizes, comm: &dyn Comm, device: Device, shards: Shards) -> Result<Mix> {
    plan.train.recompute.check(sizes.layers).map_err(anyhow::Error::msg)?;
    if let Some(mix) = plan.train.recompute.mix(sizes.layers) {
        return Ok(mix);
    }
    let train = train_on(plan, device);
    let mut hardware = plan.hardware.clone().unwrap_or_else(|| Hardware::usual(train.device));
    hardware = hardware.shared_by(Place::detect()?.local_world);
    if plan.hardware.is_none() {
        hardware.memory = device_bytes(device)? as f64;
    }
    let usable = -comm.max(&[-(hardware.usable() as f64)])?[0];
    let budget = Budget::new(
        sizes,
        &train,
        &division(plan, comm.world(), shards),
        shards.1,
        Besides::of(plan),
    );
    let (selective, full) = time::recomputation(sizes, &train, &hardware);
    let all = Mix {
        full: sizes.layers,
        selective: 0,
    };
    let found = budget.cheapest(usable as u64, selective, full);
    ensure!(
        found.is_some(),
        "train.recompute = auto finds nothing that fits: with every layer recomputed a rank needs {}, and there are {} to plan \
         with; raise train.zero, set train.shard_frozen, lower train.micro_rows, or use more ranks (`panglot plan` has the table)",
        planned::memory(&budget.with(&all)),
        text::bytes(usable as u64)
    );
    Ok(found.unwrap_or(all))
}

/// Bytes of the device that this rank has to itself.
fn device_bytes(device: Device) -> Result<u64> {
    Ok(match device {
        Device::Cuda(index) => sharding::cuda::gpu(index)?.memory_bytes,
        _ => machine_bytes() / Place::detect()?.local_world.max(1) as u64,
    })
}

/// Watches a run's memory and bytes, and compares.
pub struct Watch {
    device: Device,
    /// Taken before the model was there.
    before: u64,
    planned: Option<Planned>,
    steps: u64,
}

struct Planned {
    memory: Memory,
    traffic: Traffic,
    recompute: String,
}

impl Watch {
    /// Before the model is loaded.
    pub fn begin(device: Device) -> Result<Watch> {
        Ok(Watch {
            device,
            before: taken(device)?,
            planned: None,
            steps: 0,
        })
    }

    /// After the model is built; what is planned, in a sentence. What loading took at most is forgotten.
    pub fn plan(&mut self, trainer: &Trainer, shards: Shards) -> String {
        let (plan, world, sizes) = (trainer.plan, trainer.comm.world(), trainer.model.sizes());
        let train = train_on(plan, self.device);
        let division = division(plan, world, shards);
        let micro_batches = train.rows_per_step / world / train.micro_rows;
        let planned = Planned {
            memory: Budget::new(&sizes, &train, &division, shards.1, Besides::of(plan)).with(&trainer.recompute),
            traffic: Traffic::of(&sizes, &train, &division, shards.1, micro_batches),
            recompute: trainer.recompute.sentence(sizes.layers),
        };
        Resident::forget_peak();
        let said = format!(
            "planned for each rank: memory {}; recomputed: {}; sent in a step: {}",
            planned::memory(&planned.memory),
            planned.recompute,
            planned::traffic(&planned.traffic)
        );
        self.planned = Some(planned);
        said
    }

    /// After each step: a sentence after the first few, and after the last. All ranks call it with the same steps.
    pub fn after_step(&mut self, comm: &dyn Comm, bytes_sent: u64, is_last: bool) -> Result<Option<String>> {
        self.steps += 1;
        let Some(planned) = self.planned.as_ref().filter(|_| self.steps == FIRST_STEPS || is_last) else {
            return Ok(None);
        };
        let most = match self.device {
            Device::Cpu => Resident::now().peak,
            device => taken(device)?,
        };
        let memory = comm.max(&[most.saturating_sub(self.before) as f64])?[0];
        let sent = comm.sum(&[bytes_sent as f64])?[0] / comm.world() as f64;
        let (of_memory, of_bytes) = (planned.memory.total() as f64, planned.traffic.total() as f64);
        let bytes = match of_bytes {
            0.0 => "nothing was sent, as planned".to_owned(),
            _ => format!(
                "{} sent in the last one, {} planned ({})",
                text::bytes(sent as u64),
                planned::traffic(&planned.traffic),
                text::change(of_bytes, sent)
            ),
        };
        Ok(Some(format!(
            "measured after {}: memory {} beyond the program's own, {} planned ({}); {bytes}",
            text::counted(self.steps as usize, "step"),
            text::bytes(memory as u64),
            text::bytes(planned.memory.total()),
            text::change(of_memory, memory),
        )))
    }
}

/// Bytes in use: resident ones, or the GPU's.
fn taken(device: Device) -> Result<u64> {
    Ok(match device {
        Device::Cuda(index) => sharding::cuda::memory_used(index)?,
        _ => Resident::now().bytes,
    })
}
