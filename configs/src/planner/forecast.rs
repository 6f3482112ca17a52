//! A plan's forecast: what a run takes of memory, network and time on some hardware, which ways to divide and to recompute fit, and
//! which do not.

use serde::Serialize;

use super::checkpoint::Saving;
use super::hardware::Hardware;
use super::memory::{Besides, Budget, Division, Memory};
use super::sizes::{Parameters, Sizes};
use super::time::{self, FlopPerToken, Place, Step, StepTime};
use super::traffic::Traffic;
use crate::plan::{FrozenPrecision, Mix, Plan, Recompute, Train};

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Forecast {
    pub hardware: String,
    pub place: Place,
    pub micro_batches: usize,
    pub parameters: Parameters,
    pub flop_per_token: FlopPerToken,
    pub zero: u8,
    pub shard_frozen: bool,
    /// What layers recompute: as the config says, or as it was chosen; full where nothing fits.
    pub recompute: Mix,
    pub memory: Memory,
    /// Bytes of a rank's device that may be planned with.
    pub usable: u64,
    /// Of its host, where that is another memory and known.
    pub usable_on_host: Option<u64>,
    pub traffic: Traffic,
    pub step: StepTime,
    pub tokens_per_second: f64,
    /// Of the peak that the hardware has in the plan's precision, by the model's own FLOP.
    pub share_of_peak: f64,
    /// Of training alone: no evaluation, no failures.
    pub days: f64,
    pub node_hours: f64,
    pub saving: Saving,
    /// Each way to divide, in order.
    pub choices: Vec<Choice>,
    /// What the plan asks for and this hardware cannot do.
    pub impossible: Option<String>,
}

/// One way to divide training.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    pub zero: u8,
    pub shard_frozen: bool,
    /// Bytes between steps.
    pub kept: u64,
    /// Bytes at the fullest moment where no layer recomputes, all do selectively, all do fully.
    pub none: u64,
    pub selective: u64,
    pub full: u64,
    /// The cheapest recomputation that fits.
    pub cheapest: Option<Mix>,
    /// With it.
    pub tokens_per_second: Option<f64>,
    /// Why nothing, or not everything, fits.
    pub why: Option<String>,
    /// The plan's own.
    pub chosen: bool,
}

impl Forecast {
    /// Of `plan` for a model of these sizes; `hardware` is of one device, and ranks are placed as `place` says.
    ///
    /// # Errors
    /// When the rows of a step cannot be dealt to so many ranks: a sentence.
    pub fn of(plan: &Plan, sizes: &Sizes, place: Place, hardware: &Hardware) -> Result<Forecast, String> {
        let world = place.world();
        let train = &Train {
            device: hardware.device,
            ..plan.train.clone()
        };
        let unit = world * train.micro_rows;
        if !train.rows_per_step.is_multiple_of(unit) {
            return Err(format!(
                "train.rows_per_step = {} is not a multiple of {unit} ({world} ranks × {} micro_rows); try {}",
                train.rows_per_step,
                train.micro_rows,
                train.rows_per_step.next_multiple_of(unit)
            ));
        }
        train.recompute.check(sizes.layers)?;
        let micro_batches = train.rows_per_step / unit;
        let mine = hardware.shared_by(place.ranks_per_node);
        let usable = mine.usable();
        let costs = time::recomputation(sizes, train, &mine);
        let way = |zero: u8, shard_frozen: bool| Way {
            sizes,
            train,
            division: Division::of(zero, train.precision, world),
            shard_frozen: shard_frozen && world > 1,
            micro_batches,
            place,
            hardware: &mine,
            usable,
            besides: Besides::of(plan),
            costs,
        };
        let own = way(train.zero, train.shard_frozen);
        let budget = own.budget();
        let recompute = match train.recompute.mix(sizes.layers) {
            Some(mix) => mix,
            None => own.cheapest(&budget).unwrap_or(all(sizes, Recompute::Full)),
        };
        let step = own.step().time(&recompute);
        let tokens = (train.rows_per_step * train.sequence_length) as f64;
        let flop_per_token = FlopPerToken::of(sizes, train, &recompute);
        let parameters = sizes.parameters_of(plan);
        let frozen = parameters.total > parameters.trainable;
        let stages = if world == 1 { 1..=1 } else { 0..=3 };
        let choices = stages.flat_map(|zero| {
            let divided: &[bool] = if frozen && world > 1 { &[false, true] } else { &[false] };
            divided.iter().map(move |shard_frozen| way(zero, *shard_frozen))
        });
        let chosen = |choice: &Choice| {
            (choice.zero, choice.shard_frozen) == (own.division.zero.max(u8::from(world == 1)), own.shard_frozen)
        };
        let choices = choices.map(|way| {
            let choice = way.choice(tokens);
            Choice {
                chosen: chosen(&choice),
                ..choice
            }
        });
        let seconds = step.total * train.steps as f64;
        Ok(Forecast {
            hardware: hardware.name.clone(),
            place,
            micro_batches,
            zero: own.division.zero,
            shard_frozen: own.shard_frozen,
            memory: budget.with(&recompute),
            recompute,
            usable,
            usable_on_host: own.usable_on_host(),
            traffic: own.traffic(),
            step,
            tokens_per_second: tokens / step.total,
            share_of_peak: tokens / step.total * flop_per_token.model / (mine.flops(train.precision) * world as f64),
            days: seconds / 86_400.0,
            node_hours: seconds / 3600.0 * place.nodes as f64,
            saving: Saving::of(
                parameters.trainable,
                place.nodes,
                hardware,
                step.total,
                plan.checkpoint.every_steps,
            ),
            choices: choices.collect(),
            impossible: impossible(train, hardware),
            flop_per_token,
            parameters,
        })
    }

    pub fn fits(&self) -> bool {
        self.memory.total() <= self.usable && self.fits_host()
    }

    pub fn fits_host(&self) -> bool {
        self.usable_on_host.is_none_or(|usable| self.memory.host <= usable)
    }
}

fn impossible(train: &Train, hardware: &Hardware) -> Option<String> {
    let name = &hardware.name;
    if hardware.planning_only {
        return Some(format!(
            "Panglot does not run on {name}: what follows is for comparison alone"
        ));
    }
    if hardware.device != train.device {
        let (device, other) = (train.device.name(), hardware.device.name());
        return Some(format!(
            "train.device = {device}, but {name} is {other}; say train.device={other}, or choose other hardware"
        ));
    }
    let fp8 = train.frozen_precision == Some(FrozenPrecision::Fp8) && hardware.flops.fp8 == 0.0;
    fp8.then(|| {
        format!("train.frozen_precision = fp8, but {name} has no units for it; leave it out, or choose other hardware")
    })
}

fn all(sizes: &Sizes, mode: Recompute) -> Mix {
    match mode {
        Recompute::None => Mix::default(),
        Recompute::Selective => Mix {
            full: 0,
            selective: sizes.layers,
        },
        Recompute::Full => Mix {
            full: sizes.layers,
            selective: 0,
        },
    }
}

/// One way to divide a plan's training.
struct Way<'a> {
    sizes: &'a Sizes,
    train: &'a Train,
    division: Division,
    shard_frozen: bool,
    micro_batches: usize,
    place: Place,
    /// Of one rank.
    hardware: &'a Hardware,
    usable: u64,
    /// Checkpoints are written beside the steps.
    besides: Besides,
    costs: (f64, f64),
}

impl Way<'_> {
    fn budget(&self) -> Budget {
        Budget::new(self.sizes, self.train, &self.division, self.shard_frozen, self.besides)
    }

    /// Where nothing is divided one rank of all writes checkpoints, and has its node's whole memory to copy them to.
    fn usable_on_host(&self) -> Option<u64> {
        let writes_for_all = self.division.zero == 0 && !self.train.offload_optimizer;
        let shares = if writes_for_all { self.place.ranks_per_node } else { 1 };
        self.hardware.usable_on_host().map(|share| share * shares as u64)
    }

    fn cheapest(&self, budget: &Budget) -> Option<Mix> {
        budget.cheapest(self.usable, self.costs.0, self.costs.1)
    }

    fn step(&self) -> Step<'_> {
        Step {
            sizes: self.sizes,
            train: self.train,
            division: &self.division,
            besides: self.besides,
            shard_frozen: self.shard_frozen,
            micro_batches: self.micro_batches,
            place: self.place,
            hardware: self.hardware,
        }
    }

    fn traffic(&self) -> Traffic {
        Traffic::of(
            self.sizes,
            self.train,
            &self.division,
            self.shard_frozen,
            self.micro_batches,
        )
    }

    fn choice(&self, tokens: f64) -> Choice {
        let budget = self.budget();
        let with = |mode| budget.with(&all(self.sizes, mode));
        let [none, selective, full] = [Recompute::None, Recompute::Selective, Recompute::Full].map(with);
        let host = self.usable_on_host().filter(|usable| none.host > *usable);
        let cheapest = self.cheapest(&budget).filter(|_| host.is_none());
        let why = if let Some(usable) = host {
            Some(format!(
                "of the host's memory {:.1} GiB more than a rank's share",
                gib(none.host - usable)
            ))
        } else if none.total() <= self.usable {
            None
        } else if cheapest.is_some() {
            Some(lack("without recomputation", &none, self.usable))
        } else {
            Some(lack("even with full recomputation", &full, self.usable))
        };
        Choice {
            zero: self.division.zero,
            shard_frozen: self.shard_frozen,
            kept: none.kept(),
            none: none.total(),
            selective: selective.total(),
            full: full.total(),
            tokens_per_second: cheapest.map(|mix| tokens / self.step().time(&mix).total),
            cheapest,
            why,
            chosen: false,
        }
    }
}

/// "even with full recomputation 12.3 GiB more than there are, most of it gradients (52.1 GiB)".
fn lack(what: &str, memory: &Memory, usable: u64) -> String {
    let kinds = memory.kinds();
    let (name, most) = kinds.iter().max_by_key(|(_, bytes)| *bytes).expect("seven kinds");
    format!(
        "{what} {:.1} GiB more than there are; most is {name}, {:.1} GiB",
        gib(memory.total().saturating_sub(usable)),
        gib(*most)
    )
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Device, Recomputation};
    use crate::planner::sizes::published;

    fn mala(overrides: &[&str]) -> Plan {
        let recipe = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("mala500-7b.yaml");
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        crate::load(&recipe, &overrides).unwrap()
    }

    fn sizes(plan: &Plan) -> Sizes {
        published("llama-2-7b").unwrap().extended(plan.vocabulary.as_ref())
    }

    fn forecast(plan: &Plan, nodes: usize, hardware: &Hardware) -> Forecast {
        let place = Place {
            nodes,
            ranks_per_node: 8,
        };
        Forecast::of(plan, &sizes(plan), place, hardware).unwrap()
    }

    /// Every mix is tried: the chosen one fits, and none that costs less does.
    #[test]
    fn auto_takes_the_cheapest_recomputation_that_fits() {
        let plan = mala(&["train.recompute=auto", "train.micro_rows=1"]);
        let mut seen = Vec::new();
        for gb in [28.0, 34.0, 40.0, 46.0, 60.0, 80.0] {
            let hardware = Hardware {
                memory: gb * 1e9,
                reserved: 0.0,
                ..Hardware::usual(Device::Cuda)
            };
            let found = forecast(&plan, 2, &hardware);
            let train = Train {
                device: Device::Cuda,
                ..plan.train.clone()
            };
            let budget = Budget::new(
                &sizes(&plan),
                &train,
                &Division::of(1, plan.train.precision, 16),
                false,
                Besides::of(&plan),
            );
            let (selective, full) = time::recomputation(&sizes(&plan), &train, &hardware);
            let cost = |mix: &Mix| mix.selective as f64 * selective + mix.full as f64 * full;
            let chosen = found.recompute;
            let (mut any, usable) = (false, hardware.usable());
            for of_full in 0..=32 {
                for of_selective in 0..=32 - of_full {
                    let mix = Mix {
                        full: of_full,
                        selective: of_selective,
                    };
                    if budget.with(&mix).total() <= usable {
                        any = true;
                        assert!(
                            cost(&mix) >= cost(&chosen),
                            "{gb} GB: {mix:?} fits too and costs less than {chosen:?}"
                        );
                    }
                }
            }
            assert_eq!(found.fits(), any, "{gb} GB");
            assert_eq!(any, budget.with(&chosen).total() <= usable);
            seen.push((gb, chosen, any));
        }
        let first = seen.first().unwrap();
        assert!(!first.2, "too little is told: {seen:?}");
        assert_eq!(seen.last().unwrap().1, Mix::default(), "enough is used: {seen:?}");
        assert!(
            seen.iter().any(|(_, mix, fits)| *fits && mix.full > 0 && mix.full < 32),
            "{seen:?}"
        );
    }

    #[test]
    fn what_does_not_fit_says_why_and_what_would() {
        // All of 13.9 G parameters: weights and f32 gradients alone are over 80 GB until stage 2.
        let recipe = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("polylm-13b.yaml");
        let plan = crate::load(&recipe, &["train.zero=1".into(), "train.recompute=selective".into()]).unwrap();
        let crate::Model::Scratch { shape, .. } = &plan.model else {
            panic!("from scratch")
        };
        let place = Place {
            nodes: 32,
            ranks_per_node: 8,
        };
        let found = Forecast::of(&plan, &Sizes::of(shape, 256_000), place, &Hardware::usual(Device::Cuda)).unwrap();
        assert!(!found.fits());
        let fits: Vec<bool> = found.choices.iter().map(|choice| choice.cheapest.is_some()).collect();
        assert_eq!(fits, [false, false, true, true]);
        let why = found.choices[1].why.as_deref().unwrap();
        assert!(
            why.starts_with("even with full recomputation") && why.contains("most is gradients, 52.0 GiB"),
            "{why}"
        );
        assert!(found.choices[1].chosen && !found.choices[0].chosen);
    }

    #[test]
    fn more_ranks_than_rows_are_refused_with_a_way_out() {
        let plan = mala(&[]);
        let place = Place {
            nodes: 3,
            ranks_per_node: 8,
        };
        let said = Forecast::of(&plan, &sizes(&plan), place, &Hardware::usual(Device::Cuda)).unwrap_err();
        assert_eq!(
            said,
            "train.rows_per_step = 128 is not a multiple of 24 (24 ranks × 1 micro_rows); try 144"
        );
        let mut plan = mala(&[]);
        plan.train.recompute = Recomputation::First(Mix { full: 30, selective: 3 });
        let place = Place {
            nodes: 2,
            ranks_per_node: 8,
        };
        let said = Forecast::of(&plan, &sizes(&plan), place, &Hardware::usual(Device::Cuda)).unwrap_err();
        assert!(said.contains("names more layers than the model's 32"), "{said}");
    }
}
