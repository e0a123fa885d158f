import Foundation
import Phi3Core
import Phi3Reference

/// One call of a function, whose every number was looked at.
struct PackageCall {
    let ids: [Int32]
    let position: Int
    let mask: [UInt16]
    let record: TestBench.Call
    let isLong: Bool
    /// The model with what is in the adapter slots.
    private let model: ReferenceModel
    private let writer: SlotWriter
    let function: PackageFunction
    let package: CompiledPackage
    let state: MLState
    let context: Int

    /// Reads and checks the features of a call.
    init(
        _ features: any MLFeatureProvider, _ function: PackageFunction, _ package: CompiledPackage,
        _ state: MLState
    ) throws {
        self.function = function
        self.package = package
        self.state = state
        try PackageCall.checkNames(features, function)
        try PackageCall.checkState(state, function, package)
        func array(_ name: String) throws -> MLMultiArray {
            guard let array = features.featureValue(for: name)?.multiArrayValue else {
                throw failure(1, "\(name) is missing")
            }
            return array
        }
        func number(_ name: String) throws -> Int { Int(try array(name).integers()[0]) }
        ids = try array("inputIds").integers()
        position = try number("position")
        let causal = try array("causalMask")
        context = causal.extents[3]
        mask = causal.halves()
        let hasRow = function.signature.inputs.contains { $0.name == "ropeRow" }
        record = TestBench.Call(
            function: function.name, position: position, width: function.width,
            lastIndex: try number("lastIndex"), ropeRow: hasRow ? try number("ropeRow") : nil)
        isLong = record.ropeRow.map { $0 >= causal.extents[3] } ?? false
        let slots = try (function.signature.inputs + function.signature.states)
            .filter { $0.name.hasPrefix("lora") }
            .map { (name: $0.name, array: try state.arrays[$0.name] ?? array($0.name)) }
        let adapted = try PackageCall.adapted(function, slots, state)
        model = adapted.model
        writer = SlotWriter(
            builtIn: function.adapter, changes: adapted.changes, isLong: isLong)
        try checkNumbers()
    }

    private static func checkNames(
        _ features: any MLFeatureProvider, _ function: PackageFunction
    ) throws {
        let known = Set(function.signature.inputs.map(\.name))
        let differing = features.featureNames.symmetricDifference(known)
        if let name = differing.sorted().first {
            throw failure(1, "\(function.name): \(name) is missing, or is no input")
        }
        for tensor in function.signature.inputs {
            let array = features.featureValue(for: tensor.name)?.multiArrayValue
            guard let array, array.extents == tensor.shape,
                array.dataType == MLMultiArrayDataType(tensor.type)
            else { throw failure(1, "\(function.name): \(tensor.name) is of another form") }
        }
    }

    private static func checkState(
        _ state: MLState, _ function: PackageFunction, _ package: CompiledPackage
    ) throws {
        guard state.package.url == package.url else {
            throw failure(1, "the state is another package's")
        }
        guard Set(state.arrays.keys) == Set(function.signature.states.map(\.name)) else {
            throw failure(1, "the state has other parts than \(function.name)")
        }
        for tensor in function.signature.states
        where state.arrays[tensor.name]?.extents != tensor.shape {
            throw failure(1, "state \(tensor.name) is of another form")
        }
    }

    private func checkNumbers() throws {
        let facts = package.manifest.medphi
        for id in ids where id < 0 || Int(id) >= facts.model.vocabSize {
            throw failure(1, "id \(id) is not in the vocabulary")
        }
        guard position >= 0, position + function.width <= context else {
            throw failure(1, "position \(position) leaves the cache")
        }
        guard (0..<function.width).contains(record.lastIndex) else {
            throw failure(1, "lastIndex \(record.lastIndex) is outside the block")
        }
        if let row = record.ropeRow {
            let begins = [position, context + position]
            guard begins.contains(row) else {
                throw failure(1, "ropeRow \(row) does not go with position \(position)")
            }
            let end = position + record.lastIndex + 1
            if let switched = facts.model.rope.switchLength, end > switched, !isLong {
                throw failure(1, "\(end) tokens are turned with the short factors")
            }
        }
        try checkMask(
            hidden: HalfFloat.bits(of: Float(facts.coreml.maskValue)),
            window: facts.model.slidingWindow)
        try checkKeys(window: facts.model.slidingWindow)
    }

    /// Every number of the mask is what a causal mask with the model's window has there.
    private func checkMask(hidden: UInt16, window: Int?) throws {
        for row in 0..<function.width {
            let query = position + row
            for column in 0..<context {
                let sees = column <= query && column > query - (window ?? context + 1)
                if mask[row * context + column] != (sees ? 0 : hidden) {
                    throw failure(1, "the mask is wrong at row \(row), column \(column)")
                }
            }
        }
    }

    /// Every key that the first query sees was written by this adapter with these factors.
    private func checkKeys(window: Int?) throws {
        for slot in max(0, position + 1 - (window ?? context))..<max(position, 0)
        where state.writers[slot] != writer {
            throw failure(1, "slot \(slot) holds another sequence's keys, or none")
        }
    }

    /// Computes the logits of the wanted row and leaves keys and values in the state.
    func compute() throws -> MLMultiArray {
        var mirror = CacheMirror.of(state, model.config)
        let logits = try model.step(
            ids, at: position, cache: &mirror.cache,
            mask: .additive(mask.map { HalfFloat.value(of: $0) }, columns: context),
            usesLongFactors: isLong, output: .row(record.lastIndex))
        mirror.store(position..<position + function.width, in: state)
        for row in 0..<function.width {
            state.writers[position + row] = row <= record.lastIndex ? writer : nil
        }
        let output = MLMultiArray([1, 1, logits.count], .float16, filledWith: 0xFF)
        for (index, value) in logits.enumerated() {
            output.bytes.storeBytes(
                of: HalfFloat.bits(of: value), toByteOffset: 2 * index, as: UInt16.self)
        }
        return output
    }

    /// The model with what is in the slots now, and how often they were others in this state.
    private static func adapted(
        _ function: PackageFunction, _ slots: [(name: String, array: MLMultiArray)],
        _ state: MLState
    ) throws -> (model: ReferenceModel, changes: Int) {
        if slots.isEmpty { return (function.model, 0) }
        let last = state.adapted
        let isSame = last.map { zip($0.bytes, slots).allSatisfy { $1.array.holds($0) } } ?? false
        if isSame, let last { return (last.model, last.changes) }
        var named: [String: (shape: [Int], values: [Float])] = [:]
        for (name, array) in slots {
            named[name] = (array.extents, array.halves().map { HalfFloat.value(of: $0) })
        }
        let model = try function.model.applying(slots: named)
        let changes = (last?.changes ?? 0) + 1
        state.adapted = (slots.map { Array($0.array.bytes) }, changes, model)
        return (model, changes)
    }
}
