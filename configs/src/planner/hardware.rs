//! What a rank computes on: entries that are shipped (`configs/hardware/shipped.yaml`), entries of a file of the user's, and
//! single figures that the config puts over either.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use crate::error::sentence;
use crate::plan::{Device, Precision};

const SHIPPED: &str = include_str!("../../hardware/shipped.yaml");

/// One device. Units: bytes, seconds, FLOP/s, bytes/s; shares are of the peak beside them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// The entry's name; filled in where it is read.
    #[serde(default)]
    pub name: String,
    pub what: String,
    /// No build of ours computes on it.
    #[serde(default)]
    pub planning_only: bool,
    /// What `train.device` is on it.
    pub device: Device,
    pub memory: f64,
    pub flops: Flops,
    pub bandwidth: f64,
    pub per_node: usize,
    pub link_within: f64,
    pub link_between: f64,
    pub latency_within: f64,
    pub latency_between: f64,
    pub storage: f64,
    pub mtbf_hours: f64,
    pub gemm_share: f64,
    pub attention_share: f64,
    pub bandwidth_share: f64,
    pub link_share: f64,
    pub reserved: f64,
    /// Of the node's, for one device; 0 where it is not known, or where the device is the host.
    #[serde(default)]
    pub host_memory: f64,
    #[serde(default)]
    pub host_bandwidth: f64,
    #[serde(default)]
    pub host_link: f64,
}

/// Peaks of dense matrix products; 0 where there are no units for them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Flops {
    pub f32: f64,
    pub bf16: f64,
    pub fp8: f64,
}

/// The config's `hardware`: the name of an entry, or a name with figures of one's own over the entry's.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// None: by `train.device`.
    pub name: Option<String>,
    /// Entries beside the shipped ones.
    pub file: Option<PathBuf>,
    /// Figures by name, as in an entry.
    pub figures: BTreeMap<String, f64>,
}

impl Hardware {
    pub fn flops(&self, precision: Precision) -> f64 {
        match precision {
            Precision::F32 => self.flops.f32,
            Precision::Bf16 => self.flops.bf16,
        }
    }

    /// The entry that stands for a device where the config names none.
    pub fn usual(device: Device) -> Hardware {
        let name = match device {
            Device::Cpu => "cpu",
            Device::Cuda => "h100",
        };
        shipped().remove(name).expect("it is shipped")
    }

    /// # Errors
    /// A sentence: an unknown name or figure, a file that cannot be read, a figure that none can be.
    pub fn choose(choice: &Choice, device: Device) -> Result<Hardware, String> {
        let mut known = shipped();
        if let Some(file) = &choice.file {
            known.extend(read(file)?);
        }
        let mut hardware = match &choice.name {
            None => Hardware::usual(device),
            Some(name) => known.get(name).cloned().ok_or_else(|| {
                let names: Vec<&str> = known.keys().map(String::as_str).collect();
                format!(
                    "hardware names `{name}`, which no entry is called; known: {}, or name a file with your own by hardware.file",
                    names.join(", ")
                )
            })?,
        };
        for (key, value) in choice.figures.iter().filter(|(key, _)| *key != "per_node") {
            *hardware.figure(key).ok_or_else(|| {
                format!(
                    "hardware.{key} is no figure of an entry; known: name, file, {}",
                    FIGURES.join(", ")
                )
            })? = *value;
        }
        if let Some(per_node) = choice.figures.get("per_node") {
            hardware.per_node = *per_node as usize;
        }
        hardware.check()?;
        Ok(hardware)
    }

    fn figure(&mut self, key: &str) -> Option<&mut f64> {
        Some(match key {
            "memory" => &mut self.memory,
            "flops_f32" => &mut self.flops.f32,
            "flops_bf16" => &mut self.flops.bf16,
            "flops_fp8" => &mut self.flops.fp8,
            "bandwidth" => &mut self.bandwidth,
            "link_within" => &mut self.link_within,
            "link_between" => &mut self.link_between,
            "latency_within" => &mut self.latency_within,
            "latency_between" => &mut self.latency_between,
            "storage" => &mut self.storage,
            "mtbf_hours" => &mut self.mtbf_hours,
            "gemm_share" => &mut self.gemm_share,
            "attention_share" => &mut self.attention_share,
            "bandwidth_share" => &mut self.bandwidth_share,
            "link_share" => &mut self.link_share,
            "reserved" => &mut self.reserved,
            "host_memory" => &mut self.host_memory,
            "host_bandwidth" => &mut self.host_bandwidth,
            "host_link" => &mut self.host_link,
            _ => return None,
        })
    }

    fn check(&self) -> Result<(), String> {
        let mut copy = self.clone();
        for key in FIGURES.iter().filter(|key| **key != "per_node") {
            let value = *copy.figure(key).expect("listed");
            let share = key.ends_with("_share");
            let (holds, rule) = match *key {
                "reserved" => (
                    (0.0..1.0).contains(&value),
                    "a share of the memory, 0 or more and below 1",
                ),
                "flops_fp8" | "latency_within" | "latency_between" | "host_memory" | "host_bandwidth" | "host_link" => {
                    (value >= 0.0, "0 or more")
                }
                _ if share => (value > 0.0 && value <= 1.0, "a share above 0 and at most 1"),
                _ => (value > 0.0, "above 0"),
            };
            if !(holds && value.is_finite()) {
                return Err(format!(
                    "hardware.{key} = {value} is not {rule}; correct it, or leave it to the entry"
                ));
            }
        }
        match self.per_node {
            0 => Err("hardware.per_node = 0: a node has at least one device; correct it".to_owned()),
            _ => Ok(()),
        }
    }

    /// What one of so many ranks on a node has to itself: all of a device, or its part where ranks share.
    pub fn shared_by(&self, ranks_on_node: usize) -> Hardware {
        let part = (self.per_node as f64 / ranks_on_node.max(1) as f64).min(1.0);
        let flops = Flops {
            f32: self.flops.f32 * part,
            bf16: self.flops.bf16 * part,
            fp8: self.flops.fp8 * part,
        };
        Hardware {
            memory: self.memory * part,
            bandwidth: self.bandwidth * part,
            link_within: self.link_within * part,
            link_between: self.link_between * part,
            flops,
            ..self.clone()
        }
    }

    /// Bytes to plan with.
    pub fn usable(&self) -> u64 {
        (self.memory * (1.0 - self.reserved)) as u64
    }

    /// Bytes of the host's memory to plan with; `None` where nobody said how many there are.
    pub fn usable_on_host(&self) -> Option<u64> {
        (self.host_memory > 0.0).then_some((self.host_memory * (1.0 - self.reserved)) as u64)
    }
}

/// What a config may put over an entry.
const FIGURES: [&str; 20] = [
    "memory",
    "flops_f32",
    "flops_bf16",
    "flops_fp8",
    "bandwidth",
    "per_node",
    "link_within",
    "link_between",
    "latency_within",
    "latency_between",
    "storage",
    "mtbf_hours",
    "gemm_share",
    "attention_share",
    "bandwidth_share",
    "link_share",
    "reserved",
    "host_memory",
    "host_bandwidth",
    "host_link",
];

/// The entries that every build has, by name.
pub fn shipped() -> BTreeMap<String, Hardware> {
    named(serde_saphyr::from_str(SHIPPED).expect("the shipped entries are read by a test"))
}

fn read(file: &Path) -> Result<BTreeMap<String, Hardware>, String> {
    let text = std::fs::read_to_string(file).map_err(|error| {
        format!(
            "hardware.file = {} cannot be read: {error}; name a file like configs/hardware/shipped.yaml",
            file.display()
        )
    })?;
    let entries: BTreeMap<String, Hardware> =
        serde_saphyr::from_str(&text).map_err(|error| format!("{}: {}", file.display(), sentence(&error)))?;
    for (name, entry) in &entries {
        entry
            .check()
            .map_err(|sentence| format!("{}, {name}: {sentence}", file.display()))?;
    }
    Ok(named(entries))
}

fn named(mut entries: BTreeMap<String, Hardware>) -> BTreeMap<String, Hardware> {
    entries.iter_mut().for_each(|(name, entry)| entry.name.clone_from(name));
    entries
}

impl<'de> Deserialize<'de> for Choice {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Choice, D::Error> {
        struct Typed;
        impl<'de> serde::de::Visitor<'de> for Typed {
            type Value = Choice;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("the name of an entry, such as h100, or a section with name, file and figures")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<Choice, E> {
                Ok(Choice {
                    name: Some(name.to_owned()),
                    ..Choice::default()
                })
            }

            fn visit_map<M: serde::de::MapAccess<'de>>(self, mut map: M) -> Result<Choice, M::Error> {
                let mut choice = Choice::default();
                while let Some(key) = map.next_key::<String>()? {
                    match key.as_str() {
                        "name" => choice.name = Some(map.next_value()?),
                        "file" => choice.file = Some(map.next_value()?),
                        _ => drop(choice.figures.insert(key, map.next_value()?)),
                    }
                }
                Ok(choice)
            }
        }
        from.deserialize_any(Typed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_entries_are_sound() {
        let entries = shipped();
        let names: Vec<&str> = entries.keys().map(String::as_str).collect();
        assert_eq!(names, ["a100", "cpu", "h100", "h200", "mi250x"]);
        for entry in entries.values() {
            entry
                .check()
                .unwrap_or_else(|sentence| panic!("{}: {sentence}", entry.name));
        }
    }

    #[test]
    fn ranks_share_a_machine_of_one_device() {
        let cpu = Hardware::usual(Device::Cpu);
        let quarter = cpu.shared_by(4);
        assert_eq!(
            (quarter.memory, quarter.flops.f32),
            (cpu.memory / 4.0, cpu.flops.f32 / 4.0)
        );
        let gpu = Hardware::usual(Device::Cuda);
        assert_eq!(
            gpu.shared_by(4),
            gpu,
            "four ranks of a node with eight devices have one each"
        );
    }
}
