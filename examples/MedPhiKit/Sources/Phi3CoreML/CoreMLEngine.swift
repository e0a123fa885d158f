#if canImport(CoreML)
    import Foundation
    import Phi3Core

    #if os(Linux)
        import CoreML
    #else
        @preconcurrency import CoreML
    #endif

    /// Everything of Core ML that lives between calls, in one place: nothing of it leaves, and all of
    /// it runs on one queue.
    ///
    /// No method waits for anything, so that none can begin while another is under way.
    actor CoreMLEngine {
        private let executor = SerialQueue("MedPhiKit.core-ml")
        private let shape: PackageShape
        private let target: AdapterTarget
        private var loaded: LoadedPackage?
        private var sequence: Reading?
        // Slots as inputs, and whose they are.
        private var inputs: (owner: AdapterID?, slots: [String: MLMultiArray])?

        nonisolated var unownedExecutor: UnownedSerialExecutor {
            executor.asUnownedSerialExecutor()
        }

        /// What one state holds.
        private struct Reading {
            let state: MLState
            /// Whose keys and values they are.
            var owner: AdapterID?
            /// The ids that were read.
            var ids: [Int32] = []
            /// Which set of LongRoPE's factors turned them.
            var usesLongFactors = false
        }

        /// An engine with nothing in memory.
        init(_ shape: PackageShape, target: AdapterTarget) {
            self.shape = shape
            self.target = target
        }

        /// The compiled package and the units it was loaded on; `nil`: it is not loaded.
        var package: (url: URL, units: Manifest.CoreMLFacts.Units)? {
            loaded.map { ($0.url, $0.units) }
        }

        /// Loads the base's functions of a compiled package; nothing where they are loaded.
        func load(_ url: URL, units: [Manifest.CoreMLFacts.Units]) throws {
            if loaded != nil { return }
            try pooled { loaded = try LoadedPackage(url, shape: shape, units: units) }
        }

        /// Gives everything back.
        func unload() {
            pooled {
                sequence = nil
                inputs = nil
                loaded = nil
            }
        }

        /// Copies the bundle; its gigabytes are no work for the threads that all tasks share.
        func copy(
            _ bundle: ModelBundle, to url: URL, adding adapter: BoundAdapter?, replace: Bool
        ) throws {
            try bundle.copy(to: url, adding: adapter, replace: replace)
        }

        /// The logits after the last of all ids; `nil` where nothing is loaded.
        func logits(after ids: [Int32], adapter: BoundAdapter?) throws -> [Float]? {
            guard let loaded else { return nil }
            try check(ids)
            try Task.checkCancellation()
            try bind(adapter, loaded)
            guard let pair = loaded.pair, var sequence else {
                throw FunctionRunner.failed(shape.base.prefill, "it is not loaded")
            }
            let usesLong = shape.usesLongFactors(length: ids.count)
            if sequence.usesLongFactors != usesLong {
                // The keys in the state were turned with the other set.
                sequence.ids = []
                sequence.usesLongFactors = usesLong
            }
            let begin = BlockPlan.reusable(sequence.ids, for: ids)
            sequence.ids.removeSubrange(begin...)
            self.sequence = sequence
            var logits: [Float] = []
            for block in BlockPlan.blocks(
                of: begin..<ids.count, context: shape.context, width: shape.width)
            {
                try Task.checkCancellation()
                let runner = block.isWide ? pair.prefill : pair.decode
                let isLast = block.range.upperBound == ids.count
                try pooled {
                    let row = try run(runner, ids[block.range], block.position, sequence)
                    if isLast { logits = try numbers(row, runner) }
                }
                self.sequence?.ids += ids[block.range]
            }
            return logits
        }

        private func run(
            _ runner: FunctionRunner, _ block: ArraySlice<Int32>, _ position: Int,
            _ sequence: Reading
        ) throws -> MLMultiArray {
            do {
                return try runner.read(
                    block, at: position, usesLongFactors: sequence.usesLongFactors,
                    slots: inputs?.slots ?? [:], state: sequence.state)
            } catch {
                // Nobody says what a state holds after a failure.
                self.sequence = nil
                if let error = error as? Phi3Error { throw error }
                throw FunctionRunner.failed(
                    runner.name, "it does not run (\(LoadedPackage.reason(error)))")
            }
        }

        private func numbers(_ array: MLMultiArray, _ runner: FunctionRunner) throws -> [Float] {
            guard let row = StridedNumbers.row(of: array, count: shape.vocabulary) else {
                throw FunctionRunner.failed(
                    runner.name, "its logits are not \(shape.vocabulary) half-precision numbers")
            }
            return row
        }

        /// Core ML does not look at ids and slots: those outside would read other memory.
        private func check(_ ids: [Int32]) throws {
            func refused(_ found: String, _ expected: String) -> Phi3Error {
                .input(
                    ErrorDetails(
                        place: "tokens", found: found, expected: expected,
                        advice: "Encode the text with the model's own tokenizer."))
            }
            if ids.isEmpty { throw refused("no tokens", "at least one") }
            if let id = ids.first(where: { $0 < 0 || Int($0) >= shape.vocabulary }) {
                throw refused("id \(id)", "ids from 0 to \(shape.vocabulary - 1)")
            }
            if ids.count > shape.context {
                throw Phi3Error.contextOverflow(
                    ErrorDetails(
                        place: "sequence", found: "\(ids.count) tokens",
                        expected: "at most \(shape.context)",
                        advice: "Shorten the conversation, or export with a longer context."))
            }
        }
    }

    // MARK: - Adapters

    extension CoreMLEngine {
        /// Puts an adapter on the package, or takes it off. What was read under another is forgotten.
        private func bind(_ adapter: BoundAdapter?, _ loaded: LoadedPackage) throws {
            let owner = adapter?.id
            switch shape.manifest.medphi.adapters.mode {
            case .functions:
                let names = try functions(adapter)
                if loaded.pair?.names != names {
                    sequence = nil
                    try loaded.change(to: names)
                }
            case .slots where shape.slotKind == .input: try bindInputs(adapter)
            case .slots: break
            case .fused, .none:
                if let adapter { throw refused(adapter, "this package has no room for adapters") }
            }
            if sequence == nil, let model = loaded.pair?.prefill.model {
                sequence = Reading(state: model.makeState())
            }
            if shape.slotKind == .state { try writeSlots(adapter) }
            if sequence?.owner != owner {
                sequence?.ids = []
                sequence?.owner = owner
            }
        }

        private func functions(_ adapter: BoundAdapter?) throws -> PackageShape.Pair {
            guard let adapter else { return shape.base }
            guard let prefill = adapter.functions["prefill"],
                let decode = adapter.functions["decode"]
            else { throw refused(adapter, "this package has adapters built in, and this is none") }
            return PackageShape.Pair(prefill: prefill, decode: decode)
        }

        private func bindInputs(_ adapter: BoundAdapter?) throws {
            if let inputs, inputs.owner == adapter?.id { return }
            var arrays: [String: MLMultiArray] = [:]
            for slot in try slots(adapter) {
                let array = try MLMultiArray(
                    shape: slot.shape.map { NSNumber(value: $0) }, dataType: .float16)
                guard StridedNumbers.write(slot.bits, shape: slot.shape, to: array) else {
                    throw FunctionRunner.failed(slot.name, "it has no room for an adapter")
                }
                arrays[slot.name] = array
            }
            inputs = (adapter?.id, arrays)
        }

        /// Writes slots that are states; a new state holds zeros, which are the base.
        private func writeSlots(_ adapter: BoundAdapter?) throws {
            guard var now = sequence, now.owner != adapter?.id else { return }
            let slots = try slots(adapter)
            // Half an adapter is none: after a failure the next call begins with a new state.
            sequence = nil
            for slot in slots {
                let isWritten = now.state.withMultiArray(for: slot.name) {
                    StridedNumbers.write(slot.bits, shape: slot.shape, to: $0)
                }
                guard isWritten else {
                    throw FunctionRunner.failed(slot.name, "it has no room for an adapter")
                }
            }
            now.owner = adapter?.id
            now.ids = []
            sequence = now
        }

        private func slots(_ adapter: BoundAdapter?) throws -> [AdapterSlots.Slot] {
            if let adapter, adapter.adapter == nil {
                throw refused(adapter, "it holds no changes to fill the slots with")
            }
            return try AdapterSlots(adapter?.adapter, for: target).slots
        }

        private func refused(_ adapter: BoundAdapter, _ problem: String) -> Phi3Error {
            .adapterIncompatible(
                ProblemList(
                    path: adapter.id.name, what: "cannot be put on this package",
                    problems: [problem],
                    advice: "Export the bundle with adapter slots, or with this adapter built in."))
        }
    }
#endif
