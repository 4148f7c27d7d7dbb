//! JSON values as clients really send them: `1.0` for an integer, `0` for `false`, an array never for an object.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Unexpected, Visitor};

/// An integer; `1.0` is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Int(pub(crate) i64);

/// A finite number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Number(pub(crate) f64);

/// `true` or `false`; `1` and `0` are taken for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Flag(pub(crate) bool);

/// A JSON object read into `T`. Derived `Deserialize` would take an array of the fields, too.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Object<T>(pub(crate) T);

impl<'de> Deserialize<'de> for Int {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IntVisitor;
        impl Visitor<'_> for IntVisitor {
            type Value = Int;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an integer")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Int, E> {
                Ok(Int(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Int, E> {
                i64::try_from(value)
                    .map(Int)
                    .map_err(|_| E::invalid_value(Unexpected::Unsigned(value), &self))
            }

            #[expect(clippy::cast_possible_truncation, reason = "checked to be a whole number in range")]
            fn visit_f64<E: Error>(self, value: f64) -> Result<Int, E> {
                // 2^63 itself is out of range; every whole f64 below it converts exactly.
                if value.fract() == 0.0 && value.abs() < 9_223_372_036_854_775_808.0 {
                    Ok(Int(value as i64))
                } else {
                    Err(E::invalid_value(Unexpected::Float(value), &self))
                }
            }
        }
        deserializer.deserialize_any(IntVisitor)
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberVisitor;
        #[expect(clippy::cast_precision_loss, reason = "JSON does not distinguish 1 from 1.0")]
        impl Visitor<'_> for NumberVisitor {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Number, E> {
                Ok(Number(value))
            }
        }
        deserializer.deserialize_any(NumberVisitor)
    }
}

impl<'de> Deserialize<'de> for Flag {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FlagVisitor;
        impl Visitor<'_> for FlagVisitor {
            type Value = Flag;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a boolean")
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Flag, E> {
                Ok(Flag(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Flag, E> {
                match value {
                    0 => Ok(Flag(false)),
                    1 => Ok(Flag(true)),
                    _ => Err(E::invalid_value(Unexpected::Unsigned(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(FlagVisitor)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ObjectVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for ObjectVisitor<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_any(ObjectVisitor(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_float_is_an_integer() {
        assert_eq!(serde_json::from_str::<Int>("16.0").unwrap(), Int(16));
        assert_eq!(serde_json::from_str::<Int>("-1").unwrap(), Int(-1));
        assert!(serde_json::from_str::<Int>("1.5").is_err());
        assert!(serde_json::from_str::<Int>("1e300").is_err());
        assert!(serde_json::from_str::<Int>("18446744073709551615").is_err());
        assert!(serde_json::from_str::<Int>("\"1\"").is_err());
    }

    #[test]
    fn zero_and_one_are_booleans() {
        assert_eq!(serde_json::from_str::<Flag>("1").unwrap(), Flag(true));
        assert_eq!(serde_json::from_str::<Flag>("false").unwrap(), Flag(false));
        assert!(serde_json::from_str::<Flag>("2").is_err());
    }

    #[test]
    fn an_array_is_not_an_object() {
        #[derive(serde::Deserialize, Debug, PartialEq)]
        struct Pair {
            a: u8,
        }
        assert_eq!(
            serde_json::from_str::<Object<Pair>>(r#"{"a":1}"#).unwrap(),
            Object(Pair { a: 1 })
        );
        assert!(serde_json::from_str::<Pair>("[1]").is_ok());
        assert!(serde_json::from_str::<Object<Pair>>("[1]").is_err());
    }
}
