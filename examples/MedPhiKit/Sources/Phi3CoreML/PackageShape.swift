import Foundation
import Phi3Core

/// What the loop around a package must know of it, from the manifest.
struct PackageShape: Sendable {
    /// The two functions of the base or of one adapter.
    struct Pair: Sendable, Equatable {
        /// Reads a block of ids.
        let prefill: String
        /// Reads one id.
        let decode: String
    }

    /// The manifest.
    let manifest: Manifest
    /// Slots of the cache.
    let context: Int
    /// Ids that one prefill call reads.
    let width: Int
    /// How many keys a query sees, itself included; `nil`: all.
    let window: Int?
    /// Ids beyond which the second set of rotary tables is used; `nil`: there is one set.
    let switchLength: Int?
    /// Rows of the embedding.
    let vocabulary: Int
    /// The half-precision number that hides a key, by its bits.
    let hidden: UInt16
    /// The functions of the base.
    let base: Pair
    /// What adapter slots are; `nil` without.
    let slotKind: Manifest.Adapters.SlotKind?

    /// Takes the numbers from a manifest; nothing is checked yet.
    init(_ manifest: Manifest) {
        let ours = manifest.medphi
        let rope = ours.model.rope
        let map = manifest.language.functionMap
        self.manifest = manifest
        context = ours.coreml.contextLength
        width = ours.coreml.prefillWidth
        window = ours.model.slidingWindow
        switchLength = rope.factors == .both ? rope.switchLength : nil
        vocabulary = ours.model.vocabSize
        hidden = HalfFloat.bits(of: Float(ours.coreml.maskValue))
        base = Pair(
            prefill: map["prefill"]?.first ?? "prefill", decode: map["decode"]?.first ?? "decode")
        slotKind = ours.adapters.mode == .slots ? ours.adapters.slotKind : nil
    }

    /// Whether a sequence of so many ids is rotated with the second set of tables.
    func usesLongFactors(length: Int) -> Bool { switchLength.map { length > $0 } ?? false }
}

// MARK: - The contract

/// Whether this package's loop can call what a bundle's manifest describes.
package enum PackageContract {
    /// Throws `Phi3Error.schemaMismatch` with everything that it cannot call.
    package static func check(_ bundle: ModelBundle) throws {
        let lines = PackageShape(bundle.manifest).problems()
        if lines.isEmpty { return }
        throw mismatch(bundle.place(Manifest.fileName).path, lines)
    }

    /// The error for functions that are not what the manifest says.
    static func mismatch(_ path: String, _ lines: [String]) -> Phi3Error {
        .schemaMismatch(
            ProblemList(
                path: path, what: "the package is not what the manifest describes",
                problems: lines,
                advice: "Fetch the bundle again, or export it again with the same mlx_medphi."))
    }
}

extension PackageShape {
    /// What the manifest says of its functions that this loop cannot call, one line each.
    func problems() -> [String] {
        var lines: [String] = []
        var pairs = [base]
        for entry in manifest.medphi.adapters.list where !entry.functions.isEmpty {
            guard let prefill = entry.functions["prefill"], let decode = entry.functions["decode"]
            else {
                lines.append("adapter '\(entry.name)' has no pair of functions")
                continue
            }
            pairs.append(Pair(prefill: prefill, decode: decode))
        }
        for pair in pairs {
            lines += problems(of: pair.prefill, width: width)
            lines += problems(of: pair.decode, width: 1)
        }
        if let window, window < 1 { lines.append("sliding_window is \(window)") }
        if manifest.medphi.model.rope.factors == .both, switchLength == nil {
            lines.append("rope has both sets of factors and no switch_length")
        }
        if !(manifest.medphi.coreml.maskValue < 0) || !HalfFloat.value(of: hidden).isFinite {
            lines.append("mask_value is \(manifest.medphi.coreml.maskValue)")
        }
        return lines
    }

    private func problems(of function: String, width: Int) -> [String] {
        guard let found = manifest.medphi.coreml.functions[function] else {
            return ["function '\(function)' is not described"]
        }
        return FunctionForm(found).differences(
            function, from: signature(width: width),
            sides: (found: "the manifest", wanted: "this package's loop"))
    }

    /// What a function that reads `width` ids takes, gives and keeps.
    func signature(width: Int) -> FunctionForm {
        let model = manifest.medphi.model
        var inputs: [TensorForm] = [
            .init(name: Feature.ids, shape: [1, width], type: .int32),
            .init(name: Feature.position, shape: [1], type: .int32),
            .init(name: Feature.mask, shape: [1, 1, width, context], type: .float16),
            .init(name: Feature.lastIndex, shape: [1], type: .int32),
        ]
        if switchLength != nil {
            inputs.append(.init(name: Feature.ropeRow, shape: [1], type: .int32))
        }
        let cache = [model.layers, model.kvHeads, context, model.headSize]
        var states: [TensorForm] = [Feature.keys, Feature.values].map {
            .init(name: $0, shape: cache, type: .float16)
        }
        switch slotKind {
        case .state: states += slots()
        case .input: inputs += slots()
        case nil: break
        }
        let logits = TensorForm(
            name: Feature.logits, shape: [1, 1, vocabulary], type: .float16)
        return FunctionForm(inputs: inputs, outputs: [logits], states: states)
    }

    /// The eight adapter slots.
    private func slots() -> [TensorForm] {
        let model = manifest.medphi.model
        let rank = manifest.medphi.adapters.rankSlot ?? 0
        // A manifest is not trusted: what overflows cannot equal a real shape.
        let query = model.heads &* model.headSize
        let key = model.kvHeads &* model.headSize
        let shapes: [(Projection, outputs: Int, inputs: Int)] = [
            (.qkv, query &+ 2 &* key, model.hiddenSize), (.o, model.hiddenSize, query),
            (.gateUp, 2 &* model.intermediateSize, model.hiddenSize),
            (.down, model.hiddenSize, model.intermediateSize),
        ]
        return shapes.flatMap { projection, outputs, inputs in
            [
                .init(
                    name: "loraA_\(projection.module)", shape: [model.layers, rank, inputs],
                    type: .float16),
                .init(
                    name: "loraB_\(projection.module)", shape: [model.layers, outputs, rank],
                    type: .float16),
            ]
        }
    }
}
