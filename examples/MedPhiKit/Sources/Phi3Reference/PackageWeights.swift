import Foundation
import Phi3Core

/// The weights of a bundle's `.mlpackage`, read without Core ML: its constants have the names of the
/// checkpoint, with `_` for `.`.
///
/// Numbers are those that the package computes with: half precision, and codes times scales rounded
/// to it once. Rotary angles are computed from the manifest; of LongRoPE, whose factors the manifest
/// does not hold, the package's own tables are used.
struct PackageWeights: WeightSource {
    let config: ModelConfig
    let rotary: RotaryTables?
    private let program: PackageProgram
    private let blobs: PackageBlobs
    private let files: PackageFiles
    private let function: String

    /// Opens the package of a bundle.
    ///
    /// - Parameters:
    ///   - bundle: an opened bundle.
    ///   - function: whose constants are read; `nil`: those of the base's decode function.
    /// - Throws: `Phi3Error`: no whole package, or one that is not what the manifest says.
    init(_ bundle: ModelBundle, function: String? = nil) throws {
        let manifest = bundle.manifest
        let decode = manifest.language.functionMap["decode"]?.first
        self.function = function ?? decode ?? manifest.medphi.coreml.defaultFunction
        config = try ModelConfig(
            manifest, place: bundle.place(Manifest.fileName).path)
        files = try PackageFiles(bundle.package)
        do {
            program = try PackageProgram(try files.program()[...], function: self.function)
        } catch let damage as ProtobufReader.Damaged {
            throw PackageFiles.refused(files.model, damage.what)
        }
        blobs = try files.weights(program.files)
        rotary =
            config.longRoPE == nil
            ? nil : try PackageWeights.tables(config, manifest, program, blobs, files)
    }

    func matrix(_ layer: String, outputs: Int, inputs: Int) throws -> any RowSource {
        let name = PackageWeights.name(layer)
        if let made = program.quantised[name] {
            return try codes(made, name, [outputs, inputs])
        }
        let data = try half("\(name)_weight", [outputs, inputs])
        return PackageMatrix(rows: outputs, columns: inputs, form: .half(data))
    }

    func vector(_ layer: String, count: Int) throws -> [Float] {
        Tensor.halves(try half("\(PackageWeights.name(layer))_weight", [count]))
    }

    /// The factors of an adapter that is built into the function, where it has any.
    ///
    /// - Parameters:
    ///   - adapter: its name in the bundle.
    ///   - site: a projection.
    /// - Returns: A (rank, inputs) and B (outputs, rank), the scale folded into B; `nil`: no change.
    func factors(_ adapter: String, _ site: ProjectionSite) throws -> LowRank? {
        let front = PackageWeights.name("adapter.\(adapter).\(site.name)")
        guard let a = program.constants["\(front)_a"], a.shape.count == 2 else { return nil }
        let shape = config.shape(of: site.projection)
        let rank = a.shape[0]
        let rows = try half("\(front)_a", [rank, shape.inputs])
        let columns = try half("\(front)_b", [shape.outputs, rank])
        return LowRank(
            a: Tensor(Tensor.halves(rows), shape: [rank, shape.inputs]).transposed(),
            b: Tensor(Tensor.halves(columns), shape: [shape.outputs, rank]).transposed(), m: nil)
    }

    /// A name as MIL accepts it.
    static func name(_ text: String) -> String {
        String(text.map { $0 == "." || $0 == "-" ? "_" : $0 })
    }

    private func codes(
        _ made: PackageProgram.Quantised, _ name: String, _ shape: [Int]
    ) throws -> PackageMatrix {
        let data = try part(made.data, "data of \(name)", shape, [.uint4, .uint8, .int8])
        let small = made.scale.shape
        guard small.count == 2, small[0] == shape[0], shape[1] % small[1] == 0 else {
            throw misfit(made.scale, "scale of \(name)", "groups of its rows")
        }
        let scales = try part(made.scale, "scale of \(name)", small, [.float16])
        let offsets = try made.offset.map {
            try part($0, "offset of \(name)", small, [.float16, made.data.kind])
        }
        return PackageMatrix(
            rows: shape[0], columns: shape[1],
            form: .codes(
                PackageMatrix.Codes(
                    bytes: data, kind: made.data.kind, scales: scales, offsets: offsets,
                    offsetKind: made.offset?.kind, groups: small[1])))
    }

    /// A half-precision constant by its name.
    private func half(_ name: String, _ shape: [Int]) throws -> Data {
        guard let constant = program.constants[name] else {
            throw PackageFiles.refused(
                files.model, "function '\(function)' has no constant \(name)")
        }
        return try part(constant, name, shape, [.float16])
    }

    private func part(
        _ constant: PackageProgram.Constant, _ name: String, _ shape: [Int],
        _ kinds: [PackageProgram.Kind]
    ) throws -> Data {
        guard constant.shape == shape, kinds.contains(constant.kind) else {
            throw misfit(constant, name, "\(shape) as the manifest has it")
        }
        return try blobs.bytes(constant, name)
    }

    private func misfit(
        _ constant: PackageProgram.Constant, _ name: String, _ expected: String
    ) -> Phi3Error {
        PackageFiles.refused(
            files.model, "\(name) is \(constant.kind) \(constant.shape), not \(expected)")
    }

    private static func tables(
        _ config: ModelConfig, _ manifest: Manifest, _ program: PackageProgram,
        _ blobs: PackageBlobs, _ files: PackageFiles
    ) throws -> RotaryTables {
        let context = manifest.medphi.coreml.contextLength
        let sets = manifest.medphi.model.rope.factors == .both ? 2 : 1
        let pairs = config.rotarySize / 2
        // A manifest is not trusted: what overflows cannot equal a real shape.
        let rows = context &* sets
        let both = try ["rope_cos", "rope_sin"].map { name -> [Float] in
            guard let constant = program.constants[name], constant.kind == .float16,
                constant.shape == [rows, pairs]
            else {
                throw PackageFiles.refused(
                    files.model, "no table \(name) of \(rows) positions")
            }
            return Tensor.halves(try blobs.bytes(constant, name))
        }
        return RotaryTables(
            pairs: pairs, context: context, hasLong: sets == 2, cosines: both[0], sines: both[1])
    }
}

extension Tensor {
    /// Half-precision numbers in single precision.
    static func halves(_ data: Data) -> [Float] {
        [Float](unsafeUninitializedCapacity: data.count / 2) { room, filled in
            data.withUnsafeBytes { Tensor.decode($0, .f16, into: room) }
            filled = data.count / 2
        }
    }
}
