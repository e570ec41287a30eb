//! The optimizer's state, as a generation holds it.

use std::sync::{Arc, OnceLock};

use apollo::{Optimizer, Rule, Settings, Tensor, TensorKind};
use compute::Cpu;

use super::framed;
use crate::Target;

const MAGIC: &[u8] = b"APOLLO2\n";

/// The state. What was loaded is saved, and must load as the same.
pub const STATE: Target = Target {
    name: "optimizer_state",
    accepts: |input| {
        let mut optimizer = optimizer();
        if optimizer.load(&mut framed(MAGIC, input).as_slice()).is_err() {
            assert_eq!(saved(&optimizer), saved(&self::optimizer()), "refused, but not as new");
            return false;
        }
        let once = saved(&optimizer);
        let restored = optimizer.load(&mut once.as_slice()).expect("what was saved is refused");
        assert!(restored.reset.is_empty(), "what was saved is not known again: {:?}", restored.reset);
        assert!(saved(&optimizer) == once, "saved, loaded and saved again");
        true
    },
    seeds: || {
        let new = saved(&optimizer());
        let length = u64::from_le_bytes(new[8..16].try_into().expect("eight bytes")) as usize;
        let (header, moments) = new[16..].split_at(length);
        let looked_up = String::from_utf8(header.to_vec()).expect("JSON").replacen(
            "\"len\":0,\"moments\":\"f32\",\"norm_bits\":0,\"lookup\":{}",
            "\"len\":8,\"moments\":\"f32\",\"norm_bits\":0,\"lookup\":{\"1\":{\"slot\":0,\"gradients\":2,\"last_step\":3},\
             \"4\":{\"slot\":1,\"gradients\":1,\"last_step\":1}}",
            1,
        );
        let looked_up = looked_up.replacen("\"steps\":0", "\"steps\":3", 1);
        let more = [moments, &[0; 64]].concat();
        vec![[header, b"\0", moments].concat(), [looked_up.as_bytes(), b"\0", &more].concat(), new]
    },
    words: &[
        "\"steps\":",
        "\"tensors\":[",
        "\"lookup\":{\"1\":{\"slot\":0,\"gradients\":1,\"last_step\":1}}",
        "\"rank\":2",
        "\"rule\":\"frozen\"",
        "\"len\":18446744073709551615",
        "\"moments\":\"bf16\"",
        "\"norm_bits\":2143289344",
        "4294967295",
    ],
};

fn optimizer() -> Optimizer<Cpu> {
    static DEVICE: OnceLock<Arc<Cpu>> = OnceLock::new();
    let device = DEVICE.get_or_init(|| Arc::new(Cpu::new(1).expect("a thread")));
    let tensor = |name: &str, rows, cols, kind, rule| Tensor { name: name.into(), rows, cols, kind, rule };
    let tensors = vec![
        tensor("matrix", 6, 4, TensorKind::Matrix, Rule::Apollo),
        tensor("vector", 1, 4, TensorKind::Vector, Rule::Apollo),
        tensor("lookup", 5, 4, TensorKind::Lookup, Rule::AdamW),
        tensor("frozen", 2, 4, TensorKind::Matrix, Rule::Frozen),
    ];
    Optimizer::new(device.clone(), tensors, Settings { rank: 2, ..Settings::default() })
}

fn saved(optimizer: &Optimizer<Cpu>) -> Vec<u8> {
    let mut bytes = Vec::new();
    optimizer.save(&mut bytes).expect("a vector takes everything");
    bytes
}
