import Phi3Core

/// The constants of one function of a saved Core ML program, by their names.
///
/// Only what the weights need is read: constants that lie in the weight file, and those that Core ML
/// makes of codes, scales and offsets. What the operations compute is fixed by the exporter.
struct PackageProgram {
    /// The kinds of numbers that weights are stored in.
    enum Kind: UInt64 {
        case float16 = 10
        case int8 = 21
        case uint8 = 31
        case uint4 = 35

        /// Bits of one number.
        var bits: Int {
            switch self {
            case .float16: return 16
            case .int8, .uint8: return 8
            case .uint4: return 4
            }
        }
    }

    /// A constant of the weight file.
    struct Constant {
        let kind: Kind
        let shape: [Int]
        /// Where its record lies in the weight file.
        let offset: UInt64
    }

    /// A matrix that Core ML makes of codes, scales and perhaps offsets.
    struct Quantised {
        let data: Constant
        let scale: Constant
        let offset: Constant?
    }

    /// Constants of the weight file by name.
    private(set) var constants: [String: Constant] = [:]
    /// Matrices made of codes by name.
    private(set) var quantised: [String: Quantised] = [:]
    /// The weight files they name.
    private(set) var files: Set<String> = []

    /// The newest form of model files that is known: iOS 18, macOS 15.
    private static let newest: UInt64 = 9
    private static let constant = "const"
    private static let blockwise = "constexpr_blockwise_shift_scale"
    // A model of Core ML is a handful of names; a dimension is no longer than an array of MLX.
    private static let largest = UInt64(Int32.max)

    /// Reads the constants of a function.
    ///
    /// - Parameters:
    ///   - model: the whole `model.mlmodel`.
    ///   - function: a function of its program.
    /// - Throws: `ProtobufReader.Damaged`.
    init(_ model: ArraySlice<UInt8>, function: String) throws {
        let model = try ProtobufMessage(model)
        let version = model.number(1)
        guard (1...PackageProgram.newest).contains(version) else {
            throw ProtobufReader.Damaged(
                what: "specification version \(version), known are 1 to \(PackageProgram.newest)")
        }
        guard let program = try model.message(502) else {
            throw ProtobufReader.Damaged(what: "no ML program")
        }
        guard let body = try program.entries(2)[function] else {
            throw ProtobufReader.Damaged(what: "no function '\(function)'")
        }
        let definition = try ProtobufMessage(body)
        guard let block = try definition.entries(3)[try definition.text(2)] else {
            throw ProtobufReader.Damaged(what: "function '\(function)' has no operations")
        }
        for bytes in try ProtobufMessage(block).all(3) { try read(ProtobufMessage(bytes)) }
    }

    private mutating func read(_ operation: ProtobufMessage) throws {
        let type = try operation.text(1)
        guard type == PackageProgram.constant || type == PackageProgram.blockwise else { return }
        guard let output = try operation.message(3) else {
            throw ProtobufReader.Damaged(what: "a constant without a name")
        }
        let name = try output.text(1)
        if constants[name] != nil || quantised[name] != nil {
            throw ProtobufReader.Damaged(what: "a constant that comes twice")
        }
        if type == PackageProgram.constant {
            guard let value = try operation.entries(5)["val"] else { return }
            constants[name] = try constant(try ProtobufMessage(value))
            return
        }
        let inputs = try operation.entries(2)
        guard let data = try bound(inputs["data"]), let scale = try bound(inputs["scale"]) else {
            throw ProtobufReader.Damaged(what: "codes without scales")
        }
        quantised[name] = Quantised(data: data, scale: scale, offset: try bound(inputs["offset"]))
    }

    /// A value of the weight file; `nil` for one that stands in the program, as no weight does.
    private mutating func constant(_ value: ProtobufMessage) throws -> Constant? {
        guard let place = try value.message(5) else { return nil }
        guard let type = try value.message(2)?.message(1), let kind = Kind(rawValue: type.number(1))
        else { return nil }
        let shape = try type.all(3).map { bytes -> Int in
            let extent = try ProtobufMessage(bytes).message(1)?.number(1) ?? 0
            guard extent > 0, extent <= PackageProgram.largest else {
                throw ProtobufReader.Damaged(what: "a constant without a fixed shape")
            }
            return Int(extent)
        }
        files.insert(try place.text(1))
        return Constant(kind: kind, shape: shape, offset: place.number(2))
    }

    /// What an argument is bound to; `nil` where there is no such argument.
    private mutating func bound(_ argument: ArraySlice<UInt8>?) throws -> Constant? {
        guard let argument else { return nil }
        let bindings = try ProtobufMessage(argument).all(1)
        guard bindings.count == 1, let value = try ProtobufMessage(bindings[0]).message(2),
            let constant = try constant(value)
        else { throw ProtobufReader.Damaged(what: "codes that are not in the weight file") }
        return constant
    }
}
