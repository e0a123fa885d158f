/// The two sets of rotary divisors of LongRoPE, and the length at which the second takes over.
public struct LongRoPE: Sendable, Equatable {
    /// Divisors up to the switch, one for each pair of rotary dimensions.
    public var shortFactor: [Double]
    /// Divisors beyond it.
    public var longFactor: [Double]
    /// Tokens beyond which the long divisors apply.
    public var switchLength: Int
    /// What queries and keys are stretched by.
    public var attentionFactor: Double
}

/// MLX's affine quantisation: bits and group for all layers but the exceptions.
public struct AffineQuantization: Sendable, Equatable {
    /// Bits of each weight and inputs per scale.
    public struct Form: Sendable, Equatable {
        /// Bits per weight: 2, 3, 4, 5, 6 or 8.
        public var bits: Int
        /// Inputs per scale: 32, 64 or 128.
        public var groupSize: Int

        /// A form from its two numbers.
        public init(bits: Int, groupSize: Int) {
            self.bits = bits
            self.groupSize = groupSize
        }
    }

    /// What layers without an exception have.
    public var form: Form
    /// Layer name -> its own form; `nil` inside means: left unquantised.
    public var layers: [String: Form?]

    /// A quantisation of all layers, with exceptions.
    public init(form: Form, layers: [String: Form?] = [:]) {
        self.form = form
        self.layers = layers
    }

    /// The form of one layer; `nil` where it is not quantised.
    public func form(of layer: String) -> Form? {
        layers[layer] ?? form
    }

    /// The section as mlx-lm writes it into `config.json`.
    public var section: JSONValue {
        var section = JSONObject()
        section["group_size"] = .integer(form.groupSize)
        section["bits"] = .integer(form.bits)
        section["mode"] = "affine"
        for (name, own) in layers.sorted(by: { $0.key < $1.key }) {
            section[name] =
                own.map {
                    ["bits": .integer($0.bits), "group_size": .integer($0.groupSize)]
                } ?? .bool(false)
        }
        return .object(section)
    }
}

/// The architecture of one Phi-3 checkpoint, read from any form of `config.json` that Phi-3 was
/// published with. What is not understood is an error: a guess would be a different model.
public struct ModelConfig: Sendable, Equatable {
    /// Rows of the embedding.
    public var vocabSize: Int
    /// Width of the residual stream.
    public var hiddenSize: Int
    /// Width inside the feed-forward layers.
    public var intermediateSize: Int
    /// Blocks.
    public var layerCount: Int
    /// Query heads.
    public var headCount: Int
    /// Key and value heads.
    public var keyValueHeadCount: Int
    /// Width of a head.
    public var headSize: Int
    /// What is added to a mean square before its root.
    public var normEpsilon: Double
    /// Tokens the model was made for.
    public var maxPositions: Int
    /// The base of the rotary wavelengths.
    public var ropeTheta: Double
    /// How many of a head's numbers turn with the position.
    public var rotarySize: Int
    /// LongRoPE's factors; `nil` for plain rotary positions.
    public var longRoPE: LongRoPE?
    /// How many keys a query sees, itself included; `nil`: all.
    public var slidingWindow: Int?
    /// Whether the head's weight is the embedding's.
    public var tiesEmbeddings: Bool
    /// How the weights are quantised; `nil`: not at all.
    public var quantization: AffineQuantization?

    /// Blocks that no Phi-3 has: lists of all blocks are made from numbers that a file gives.
    public static let mostLayers = 10_000
    /// Extents beyond this are no arrays of MLX.
    static let mostWhole = Int(Int32.max)

    /// Width of all query heads together.
    public var queryWidth: Int { headCount * headSize }
    /// Width of all key heads together, which is that of all value heads.
    public var keyValueWidth: Int { keyValueHeadCount * headSize }
    /// Tokens beyond which LongRoPE's long factors apply; `nil` without LongRoPE.
    public var switchLength: Int? { longRoPE?.switchLength }

    /// Whether a sequence of some tokens is rotated with the long factors.
    public func usesLongFactors(length: Int) -> Bool {
        switchLength.map { length > $0 } ?? false
    }
}

/// A projection of a Phi-3 block that an adapter can change, in the order they are computed.
public enum Projection: Int, Sendable, CaseIterable, Comparable {
    /// Queries, keys and values in one.
    case qkv
    /// What attention gives, back to the residual stream.
    case o
    /// Gate and up in one.
    case gateUp
    /// The feed-forward layer's way back.
    case down

    /// Its name in a checkpoint, e.g. `self_attn.qkv_proj`.
    public var key: String {
        switch self {
        case .qkv: return "self_attn.qkv_proj"
        case .o: return "self_attn.o_proj"
        case .gateUp: return "mlp.gate_up_proj"
        case .down: return "mlp.down_proj"
        }
    }

    /// Its name in adapter slots, e.g. `gate_up`.
    public var module: String {
        switch self {
        case .qkv: return "qkv"
        case .o: return "o"
        case .gateUp: return "gate_up"
        case .down: return "down"
        }
    }

    /// The projection with this name in a checkpoint.
    public init?(key: some StringProtocol) {
        guard let found = Projection.allCases.first(where: { $0.key == key }) else { return nil }
        self = found
    }

    /// Whether one is computed before the other.
    public static func < (left: Projection, right: Projection) -> Bool {
        left.rawValue < right.rawValue
    }
}

/// One projection of one block.
public struct ProjectionSite: Sendable, Hashable, Comparable, CustomStringConvertible {
    /// The block, from 0.
    public var layer: Int
    /// The projection in it.
    public var projection: Projection

    /// A projection of a block.
    public init(layer: Int, projection: Projection) {
        self.layer = layer
        self.projection = projection
    }

    /// Its name in a checkpoint, e.g. `model.layers.0.mlp.down_proj`.
    public var name: String { "model.layers.\(layer).\(projection.key)" }
    /// The same name.
    public var description: String { name }

    /// Whether one is computed before the other.
    public static func < (left: ProjectionSite, right: ProjectionSite) -> Bool {
        (left.layer, left.projection) < (right.layer, right.projection)
    }
}
