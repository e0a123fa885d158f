import Foundation

/// Which base model this is: a short text that an adapter carries to its base.
///
/// The SHA-256 of the text `medphi-base-1` with a line feed, of the architecture as canonical JSON,
/// and of each tensor's name, kind, shape and bytes: all of them up to 64 KiB, else 16 samples of
/// 4 KiB. It is the same whatever the files are called and however the model is sharded.
public struct Fingerprint: Sendable, Hashable, CustomStringConvertible {
    /// The whole text: 64 hexadecimal digits, and `-q4g64` or the like for a base that was quantised
    /// to 4 bits in groups of 64 when it was loaded.
    public let text: String

    /// A fingerprint that a file or a manifest states.
    public init(_ text: String) { self.text = text }

    /// The whole text.
    public var description: String { text }

    /// For messages: the first sixteen digits, and how the base was quantised on loading.
    public var short: String {
        let parts = text.split(separator: "-", maxSplits: 1, omittingEmptySubsequences: false)
        let digits = printable(String((parts.first ?? "").prefix(16)))
        return parts.count == 2
            ? "\(digits)…-\(printable(String(parts[1].prefix(16))))" : "\(digits)…"
    }

    /// How a base was quantised on loading, where this is the fingerprint of `base` with that added;
    /// `nil`: another base, or the base itself.
    public func quantized(from base: Fingerprint) -> AffineQuantization.Form? {
        guard text.utf8.starts(with: base.text.utf8) else { return nil }
        let rest = Array(text.utf8.dropFirst(base.text.utf8.count))
        guard rest.starts(with: Array("-q".utf8)), let g = rest.firstIndex(of: UInt8(ascii: "g"))
        else {
            return nil
        }
        let bits = Fingerprint.digits(rest[2..<g], atMost: 2)
        let group = Fingerprint.digits(rest[(g + 1)...], atMost: 4)
        guard let bits, let group else { return nil }
        return AffineQuantization.Form(bits: bits, groupSize: group)
    }

    /// Whether the text can be a fingerprint.
    public var isPossible: Bool {
        let digits = Array(text.utf8.prefix(64))
        guard digits.count == 64, digits.allSatisfy(isLowerHex) else { return false }
        return text.utf8.count == 64
            || quantized(from: Fingerprint(String(decoding: digits, as: UTF8.self))) != nil
    }

    private static func digits(_ bytes: ArraySlice<UInt8>, atMost most: Int) -> Int? {
        guard (1...most).contains(bytes.count), bytes.allSatisfy({ (0x30...0x39).contains($0) })
        else {
            return nil
        }
        return Int(String(decoding: bytes, as: UTF8.self))
    }

    private static let wholeBytes = 64 * 1024, samples = 16, sampleBytes = 4096

    /// The fingerprint of a checkpoint.
    ///
    /// - Parameter checkpoint: the base, opened.
    public init(of checkpoint: Checkpoint) {
        var hash = SHA256()
        hash.update("medphi-base-1\n")
        hash.update(Fingerprint.architecture(checkpoint.config).text(.canonical) + "\n")
        let names = checkpoint.tensors.keys.sorted { $0.utf8.lexicographicallyPrecedes($1.utf8) }
        for name in names {
            guard let tensor = checkpoint.tensor(name) else { continue }
            let extents = tensor.shape.map(String.init).joined(separator: "x")
            hash.update("\(name) \(tensor.type.rawValue) \(extents)\n")
            tensor.data.withUnsafeBytes { bytes in
                if bytes.count <= Fingerprint.wholeBytes { return hash.update(bytes) }
                let last = Fingerprint.samples - 1
                for k in 0...last {
                    let begin = k * (bytes.count - Fingerprint.sampleBytes) / last
                    hash.update(
                        UnsafeRawBufferPointer(
                            rebasing: bytes[begin..<begin + Fingerprint.sampleBytes]))
                }
            }
        }
        text = hash.hexDigest()
    }

    /// The architecture with floats written with nine digits, so that all machines agree.
    private static func architecture(_ config: ModelConfig) -> JSONValue {
        func nine(_ value: Double) -> JSONValue { .string(String(format: "%.9g", value)) }
        func whole(_ value: Int?) -> JSONValue { value.map { .integer($0) } ?? .null }
        let long: JSONValue =
            config.longRoPE.map {
                [
                    "short_factor": .array($0.shortFactor.map(nine)),
                    "long_factor": .array($0.longFactor.map(nine)),
                    "original_max_position_embeddings": .integer($0.switchLength),
                    "attention_factor": nine($0.attentionFactor),
                ]
            } ?? .null
        let quantization: JSONValue =
            config.quantization.map { own in
                let layers = own.layers.map { name, form -> (name: String, value: JSONValue) in
                    guard let form else { return (name: name, value: .null) }
                    return (
                        name: name, value: .array([.integer(form.bits), .integer(form.groupSize)])
                    )
                }
                return [
                    "bits": .integer(own.form.bits), "group_size": .integer(own.form.groupSize),
                    "layers": .object(JSONObject(layers)),
                ]
            } ?? .null
        return [
            "vocab_size": whole(config.vocabSize), "hidden_size": whole(config.hiddenSize),
            "intermediate_size": whole(config.intermediateSize),
            "num_hidden_layers": whole(config.layerCount),
            "num_attention_heads": whole(config.headCount),
            "num_key_value_heads": whole(config.keyValueHeadCount),
            "head_dim": whole(config.headSize), "rms_norm_eps": nine(config.normEpsilon),
            "max_position_embeddings": whole(config.maxPositions),
            "rope_theta": nine(config.ropeTheta), "rotary_dim": whole(config.rotarySize),
            "longrope": long, "sliding_window": whole(config.slidingWindow),
            "tie_word_embeddings": .bool(config.tiesEmbeddings), "quantization": quantization,
        ]
    }
}

/// Whether a byte is a hexadecimal digit as hashes are written.
func isLowerHex(_ byte: UInt8) -> Bool {
    (0x30...0x39).contains(byte) || (0x61...0x66).contains(byte)
}

/// Whether a text is a SHA-256: 64 lower-case hexadecimal digits.
func isSHA256(_ text: String) -> Bool {
    text.utf8.count == 64 && text.utf8.allSatisfy(isLowerHex)
}
