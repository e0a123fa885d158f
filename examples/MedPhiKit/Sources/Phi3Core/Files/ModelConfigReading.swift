import Foundation

extension ModelConfig {
    /// Reads the parsed `config.json`, in the old form or in the one of transformers 5.
    ///
    /// - Parameters:
    ///   - raw: the parsed file.
    ///   - place: its name, for messages.
    /// - Throws: `Phi3Error.checkpoint`: not Phi-3, a missing or impossible value, or an unknown rope
    ///   scaling.
    public static func fromHF(_ raw: JSONValue, place: String = "config.json") throws -> ModelConfig
    {
        guard let members = raw.object else {
            throw problem(place, "it is \(raw.shown)", "a JSON object")
        }
        guard raw["model_type"]?.string == "phi3" else {
            throw problem(place, "model_type is \(raw["model_type"]?.shown ?? "missing")", "'phi3'")
        }
        let bias = raw["attention_bias"]?.isTruthy ?? false
        if let act = raw["hidden_act"], act.string != "silu" {
            throw problem(place, "hidden_act is \(act.shown)", "'silu'")
        }
        if bias { throw problem(place, "attention_bias is true", "false") }
        let read = ConfigReader(members, place)
        let rope = try RopeSection(members, place)
        return try config(read, rope)
    }

    private static func config(_ read: ConfigReader, _ rope: RopeSection) throws -> ModelConfig {
        let hidden = try read.whole("hidden_size")
        let heads = try read.whole("num_attention_heads")
        let keyHeads = try read.whole("num_key_value_heads", heads)
        let givesSize = !(read.members["head_dim"]?.isNull ?? true)
        guard heads % keyHeads == 0, givesSize || hidden % heads == 0 else {
            throw problem(
                read.place,
                "\(heads) heads do not fit hidden_size \(hidden) or "
                    + "num_key_value_heads \(keyHeads)", "numbers that divide each other")
        }
        let size = try read.whole("head_dim", hidden / heads)
        let inner = try read.whole("intermediate_size")
        // Within these bounds no product of two extents leaves 64 bits.
        guard heads * size <= mostWhole, inner <= mostWhole / 2 else {
            throw problem(
                read.place, "\(heads) heads of \(size), inner width \(inner)",
                "matrices of at most \(mostWhole) rows")
        }
        let positions = try read.whole("max_position_embeddings")
        // Twice is as impossible as 1e308 times, and a whole number.
        let rotary = Int(Double(size) * min(rope.partialFactor, 2))
        guard rotary >= 2, rotary % 2 == 0, rotary <= size else {
            throw problem(
                read.place, "\(rotary) rotary dimensions of \(size)", "an even number within a head"
            )
        }
        let window = read.members["sliding_window"]
        let config = ModelConfig(
            vocabSize: try read.whole("vocab_size"), hiddenSize: hidden, intermediateSize: inner,
            layerCount: try read.whole("num_hidden_layers", most: mostLayers), headCount: heads,
            keyValueHeadCount: keyHeads, headSize: size,
            normEpsilon: try read.number("rms_norm_eps", 1e-5), maxPositions: positions,
            ropeTheta: rope.theta, rotarySize: rotary,
            longRoPE: try rope.longRoPE(pairs: rotary / 2, positions: positions, read),
            slidingWindow: window?.isNull ?? true ? nil : try read.whole("sliding_window"),
            tiesEmbeddings: try read.flag("tie_word_embeddings"),
            quantization: try quantization(read))
        guard config.hasPossibleSize else {
            throw problem(
                read.place, "extents whose weights are more than \(mostWeights)", "those of a Phi-3"
            )
        }
        return config
    }

    static func problem(_ place: String, _ found: String, _ expected: String) -> Phi3Error {
        .checkpoint(
            place, found, expected: expected,
            advice: "Only Phi-3 models can be used; fetch the model's config.json again.")
    }

    private static func quantization(_ read: ConfigReader) throws -> AffineQuantization? {
        guard let section = read.members["quantization"], !section.isNull else {
            if let other = read.members["quantization_config"], !other.isNull {
                throw problem(
                    read.place,
                    "quantised in a form MLX does not write (quantization_config alone)",
                    "an unquantised model or an MLX one")
            }
            return nil
        }
        guard let members = section.object else {
            throw problem(read.place, "quantization is \(section.shown)", "an object")
        }
        var layers: [String: AffineQuantization.Form?] = [:]
        for (name, value) in members {
            if let own = value.object {
                layers[name] = .some(
                    try form(own, "\(read.place): quantization of \(printable(name))"))
            } else if value.bool == false {
                layers[name] = .some(nil)
            }
        }
        return AffineQuantization(
            form: try form(members, "\(read.place): quantization"), layers: layers)
    }

    private static func form(
        _ section: JSONObject, _ place: String
    ) throws -> AffineQuantization.Form {
        if let mode = section["mode"], mode.string != "affine" {
            throw problem(place, "mode \(mode.shown)", "'affine'")
        }
        let bits = section["bits"]?.double
        let group = section["group_size"]?.double
        guard let bits, let group, [2, 3, 4, 5, 6, 8].contains(bits), [32, 64, 128].contains(group)
        else {
            throw problem(
                place,
                "bits \(section["bits"]?.shown ?? "missing") and group_size "
                    + "\(section["group_size"]?.shown ?? "missing")", "an affine format of MLX")
        }
        return AffineQuantization.Form(bits: Int(bits), groupSize: Int(group))
    }
}

/// Typed access to config values, with the file named in each complaint.
struct ConfigReader {
    let members: JSONObject
    let place: String

    init(_ members: JSONObject, _ place: String) {
        self.members = members
        self.place = place
    }

    /// The value of a key; `nil` where it is absent or null.
    private func given(_ name: String) -> JSONValue? {
        members[name].flatMap { $0.isNull ? nil : $0 }
    }

    func whole(
        _ name: String, _ otherwise: Int? = nil, most: Int = ModelConfig.mostWhole
    ) throws -> Int {
        let value = given(name)
        let found = value == nil ? otherwise : value?.integer
        guard let found, found >= 1, found <= most else {
            throw ModelConfig.problem(
                place, "\(name) is \(value?.shown ?? otherwise.map(String.init) ?? "missing")",
                "a positive whole number up to \(most)")
        }
        return found
    }

    func number(_ name: String, _ otherwise: Double) throws -> Double {
        let value = given(name)
        let found = value == nil ? otherwise : value?.double
        guard let found, found > 0, found.isFinite else {
            throw ModelConfig.problem(
                place, "\(name) is \(value?.shown ?? "\(otherwise)")", "a positive number")
        }
        return found
    }

    func flag(_ name: String) throws -> Bool {
        guard let value = given(name) else { return false }
        guard let flag = value.bool else {
            throw ModelConfig.problem(place, "\(name) is \(value.shown)", "true or false")
        }
        return flag
    }
}

/// Both forms of the rope settings as one.
struct RopeSection {
    let members: JSONObject
    let isLong: Bool
    let theta: Double
    let partialFactor: Double

    // `su` and `yarn` are the names the first 128k checkpoints used for what is now longrope.
    private static let longNames = ["longrope", "su", "yarn"]

    init(_ raw: JSONObject, _ place: String) throws {
        // Where a file holds both forms, transformers takes the old one.
        let old = raw["rope_scaling"]
        let scaling = old?.isTruthy == true ? old : raw["rope_parameters"]
        guard scaling?.isNull ?? true || scaling?.object != nil else {
            throw ModelConfig.problem(
                place, "rope settings are \(scaling?.shown ?? "")", "an object")
        }
        let section = scaling?.object ?? JSONObject()
        let kind = section["rope_type"] ?? section["type"] ?? "default"
        isLong = RopeSection.longNames.contains(kind.string ?? "")
        guard isLong || kind.string == "default" else {
            throw ModelConfig.problem(
                place, "rope scaling \(kind.shown)", "one of default, longrope, su, yarn")
        }
        func value(_ name: String, _ otherwise: Double) throws -> Double {
            let own = !(section[name]?.isNull ?? true)
            return try ConfigReader(own ? section : raw, place).number(name, otherwise)
        }
        theta = try value("rope_theta", 10000)
        partialFactor = try value("partial_rotary_factor", 1)
        members = section
    }

    func longRoPE(pairs: Int, positions: Int, _ read: ConfigReader) throws -> LongRoPE? {
        guard isLong else { return nil }
        func factors(_ name: String) throws -> [Double] {
            let values = members[name]?.array ?? []
            let numbers = values.compactMap { $0.double }.filter { $0 > 0 }
            guard numbers.count == values.count, values.count == pairs else {
                throw ModelConfig.problem(
                    read.place, "\(name) is \(members[name]?.shown ?? "missing")",
                    "\(pairs) positive numbers")
            }
            return numbers
        }
        let short = try factors("short_factor")
        let long = try factors("long_factor")
        // transformers prefers the top-level value.
        let key = "original_max_position_embeddings"
        let top = read.members[key]
        let found = top?.isTruthy == true ? top : members[key]
        guard let original = found?.integer, original >= 2, original <= ModelConfig.mostWhole else {
            throw ModelConfig.problem(
                read.place, "\(key) is \(found?.shown ?? "missing")", "a whole number above 1")
        }
        let own = ConfigReader(members, read.place)
        let stretch = try own.number("factor", Double(positions) / Double(original))
        // LongRoPE (Ding et al. 2024), section 3, as transformers computes it.
        let usual = stretch > 1 ? (1 + log(stretch) / log(Double(original))).squareRoot() : 1
        return LongRoPE(
            shortFactor: short, longFactor: long, switchLength: original,
            attentionFactor: try own.number("attention_factor", usual))
    }
}

extension JSONValue: ExpressibleByStringLiteral {
    /// Text from a literal.
    public init(stringLiteral value: String) { self = .string(value) }
}
