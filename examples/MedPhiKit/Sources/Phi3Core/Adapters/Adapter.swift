import Foundation

/// The change of one projection by two narrow matrices: W' = W + scale · (A B)ᵀ.
public struct LowRank: Sendable {
    /// A, (inputs, rank).
    public let a: Tensor
    /// B, (rank, outputs).
    public let b: Tensor
    /// DoRA's length of each row of W', (outputs); `nil` for LoRA.
    public let m: Tensor?

    /// A change from its factors.
    public init(a: Tensor, b: Tensor, m: Tensor?) {
        self.a = a
        self.b = b
        self.m = m
    }

    /// The inner size of the two.
    public var rank: Int { a.shape.last ?? 0 }

    /// The tensors by the last part of mlx-lm's names.
    var parts: [(name: String, tensor: Tensor)] {
        let pair = [(name: "lora_a", tensor: a), (name: "lora_b", tensor: b)]
        return m.map { pair + [(name: "m", tensor: $0)] } ?? pair
    }
}

/// A set of low-rank changes of one Phi-3, whatever file it was read from.
public struct Adapter: Sendable {
    /// The kinds of files, by the names that slot packs record.
    public enum Form: String, Sendable, CaseIterable {
        /// The single file that training writes, e.g. `medical_changes.safetensors`.
        case file = "medphi file"
        /// A pack for a package with adapter slots.
        case slotPack = "slot pack"
        /// A folder with the files of both.
        case both = "mlx-lm and PEFT directory"
        /// mlx-lm's folder.
        case mlx = "mlx-lm directory"
        /// PEFT's folder.
        case peft = "PEFT directory"
    }

    /// How strong an adapter is.
    public struct Scaling: Sendable, Equatable {
        /// The inner size of its matrices; the largest where they differ.
        public var rank: Int
        /// What A B is multiplied by.
        public var scale: Double
        /// Whether it is DoRA.
        public var isDoRA: Bool
        /// The dropout it was trained with.
        public var dropout: Double = 0
    }

    /// Where an adapter comes from; what a file does not say is `nil`.
    public struct Origin: Sendable, Equatable {
        /// Hub id or folder name of the base, never a path.
        public var baseName: String?
        /// Which base it belongs to.
        public var baseFingerprint: Fingerprint?
        /// The base's quantisation as mlx-lm's `config.json` has it; `nil`: plain, or not said.
        public var baseQuantization: JSONObject?
        /// The mlx_medphi that wrote the file.
        public var packageVersion: String?
        /// Facts of the training run.
        public var training = JSONObject()
        /// SHA-256 of the tokenizer it goes with.
        public var tokenizerSHA256: String?
        /// SHA-256 of that tokenizer's chat template.
        public var chatTemplateSHA256: String?

        /// What is known of a base.
        public init(
            baseName: String? = nil, baseFingerprint: Fingerprint? = nil,
            baseQuantization: JSONObject? = nil
        ) {
            self.baseName = baseName
            self.baseFingerprint = baseFingerprint
            self.baseQuantization = baseQuantization
        }
    }

    /// The file or folder.
    public let url: URL
    /// The changes.
    public let changes: [ProjectionSite: LowRank]
    /// How strong it is.
    public let scaling: Scaling
    /// Blocks of the base, as far as the file tells.
    public let modelLayers: Int
    /// Where it comes from.
    public let origin: Origin
    /// The kind of file.
    public let form: Form

    /// The adapted sites, in the order they are computed.
    public var sites: [ProjectionSite] { changes.keys.sorted() }

    /// The adapted blocks, in order.
    public var layers: [Int] { Set(changes.keys.map(\.layer)).sorted() }

    /// The adapted projections of a block, in the order they are computed.
    public var projections: [Projection] { Set(changes.keys.map(\.projection)).sorted() }

    /// Whether it changes nothing, because every A or every B is zero.
    public var hasNoEffect: Bool {
        !scaling.isDoRA && changes.values.allSatisfy { $0.a.isZero || $0.b.isZero }
    }

    /// SHA-256 of names, kinds, shapes and values: equal for equal adapters in different files.
    public var weightsSHA256: String { Adapter.hash(of: tensors()) }

    /// SHA-256 of all that decides what it computes: its tensors, what A B is multiplied by at each
    /// site, and whether it is DoRA. Equal tensors under another scale are another adapter.
    public var effectSHA256: String {
        var hash = SHA256()
        hash.update("\(weightsSHA256)\n")
        for site in sites {
            hash.update("\(site.name) \(scaling.scale.bitPattern) \(scaling.isDoRA)\n")
        }
        return hash.hexDigest()
    }

    /// All tensors by mlx-lm's names, sorted.
    func tensors() -> [(name: String, tensor: Tensor)] {
        changes.flatMap { site, change in
            change.parts.map { (name: "\(site.name).\($0.name)", tensor: $0.tensor) }
        }.sorted { $0.name.utf8.lexicographicallyPrecedes($1.name.utf8) }
    }

    static func hash(of tensors: [(name: String, tensor: Tensor)]) -> String {
        var hash = SHA256()
        for (name, tensor) in tensors {
            hash.update("\(name) mlx.core.\(tensor.type.mlxName) \(Layout.shown(tensor.shape))\n")
            hash.update(tensor.data)
        }
        return hash.hexDigest()
    }
}

extension TensorType {
    /// MLX's name of a kind that weights are stored in.
    var mlxName: String {
        switch self {
        case .f32: return "float32"
        case .f16: return "float16"
        case .bf16: return "bfloat16"
        default: return rawValue
        }
    }
}

/// Problems of one adapter while it is read; what is fatal is thrown at once.
final class AdapterProblems {
    /// One line each.
    var lines: [String] = []

    /// Adds a line.
    func add(_ line: String) { lines.append(line) }

    /// Adds what is impossible about rank, scale or dropout, as a file states them.
    func checkScaling(rank: JSONValue?, scale: JSONValue?, dropout: JSONValue?) -> (
        rank: Int, scale: Double, dropout: Double
    )? {
        let before = lines.count
        let found = rank?.integer ?? 0
        if found < 1 || found > Adapter.largestRank {
            add(
                "rank is \(rank?.shown ?? "missing"), expected a positive whole number up to "
                    + "\(Adapter.largestRank)")
        }
        let factor = scale?.double ?? 0
        if factor <= 0 { add("scale is \(scale?.shown ?? "missing"), expected a positive number") }
        let dropped = dropout == nil ? 0 : dropout?.double ?? -1
        if !(0...0.9).contains(dropped) {
            add("dropout is \(dropout?.shown ?? ""), expected a number between 0 and 0.9")
        }
        return lines.count == before ? (found, factor, dropped) : nil
    }
}

extension Adapter {
    /// Ranks beyond this are no low ranks.
    static let largestRank = 4096

    /// One error with everything that speaks against an adapter.
    static func refused(
        _ url: URL, _ what: String, _ problems: [String], advice: String
    ) -> Phi3Error {
        .adapterIncompatible(
            ProblemList(path: url.path, what: what, problems: problems, advice: advice))
    }

    /// A base's hub id or folder name; the rest of a path tells about the machine, not the model.
    static func baseLabel(_ name: String?) -> String? {
        guard let name else { return nil }
        let parts = name.split(separator: "/")
        if let cached = parts.first(where: { $0.hasPrefix("models--") }),
            parts.contains("snapshots")
        {
            let id = cached.dropFirst("models--".count)
            if let cut = id.firstRange(of: "--") {
                return "\(id[..<cut.lowerBound])/\(id[cut.upperBound...])"
            }
        }
        let slashes = name.utf8.filter { $0 == UInt8(ascii: "/") }.count
        let isID = slashes == 1 && parts.count == 2 && !"./~".contains(name.first ?? ".")
        return isID ? name : parts.last.map(String.init)
    }
}
