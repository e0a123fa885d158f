import Foundation

extension Adapter {
    /// Reads an adapter and checks that it fits a model, before anything of it is used.
    ///
    /// - Parameters:
    ///   - url: any form that `read` reads.
    ///   - target: the model.
    ///   - base: the model's checkpoint where it is on this machine; see `read`.
    ///   - options: what is accepted that would otherwise be refused.
    /// - Throws: `Phi3Error`: missing or unreadable, or `adapterIncompatible` with everything that
    ///   speaks against it, the file's own faults and those on this model together.
    public static func load(
        _ url: URL, for target: AdapterTarget, base: Checkpoint? = nil,
        options: AdapterOptions = AdapterOptions()
    ) throws -> Adapter {
        let reading = try reading(url, base: base)
        let misfits = reading.adapter?.problems(on: target, options: options) ?? []
        guard let adapter = reading.adapter, reading.problems.isEmpty, misfits.isEmpty else {
            let ownFault = !reading.problems.isEmpty
            throw refused(
                url, ownFault ? reading.what : "does not fit this model",
                reading.problems + misfits,
                advice: ownFault
                    ? reading.advice
                    : "Load the base it was trained on (\(reading.adapter?.origin.baseName ?? "not named"))."
            )
        }
        return adapter
    }
}

/// An adapter as the arrays that a package with adapter slots takes.
public struct AdapterSlots: Sendable {
    /// One slot.
    public struct Slot: Sendable {
        /// Its name, e.g. "loraA_gate_up".
        public let name: String
        /// (layers, rank, in) of A or (layers, out, rank) of B.
        public let shape: [Int]
        /// Half-precision numbers by their bits, the last extent fastest.
        public let bits: [UInt16]
    }

    /// All eight slots, sorted by name.
    public let slots: [Slot]

    /// The slots of an adapter, the scale folded into B; of `nil` all zeros, which is the base.
    ///
    /// - Parameters:
    ///   - adapter: one that was loaded for this target.
    ///   - target: a model with slots.
    /// - Throws: `Phi3Error.adapterIncompatible` where it does not fit after all.
    public init(_ adapter: Adapter?, for target: AdapterTarget) throws {
        let rank = target.slotRank ?? 0
        if let adapter {
            let options = AdapterOptions(allowsUnstatedBase: true, allowsOtherBase: true)
            let problems = adapter.problems(on: target, options: options)
            if rank == 0 || !problems.isEmpty {
                throw Adapter.refused(
                    adapter.url, "does not fit the slots",
                    rank == 0 ? ["this model has no slots"] : problems,
                    advice: "Choose another adapter.")
            }
        }
        var slots: [Slot] = []
        for projection in Projection.allCases {
            guard let shape = target.shapes[projection] else { continue }
            try AdapterSlots.checkSize(target.layerCount, rank, shape)
            let names = SlotPack.names(projection)
            let sizes = (a: rank * shape.inputs, b: shape.outputs * rank)
            var a = [UInt16](repeating: 0, count: target.layerCount * sizes.a)
            var b = [UInt16](repeating: 0, count: target.layerCount * sizes.b)
            for layer in 0..<target.layerCount {
                let site = ProjectionSite(layer: layer, projection: projection)
                guard let adapter, let change = adapter.changes[site] else { continue }
                let rows = change.a.transposed().floats()
                let own = change.rank
                for (index, value) in rows.enumerated() {
                    a[layer * sizes.a + index] = HalfFloat.bits(of: value)
                }
                let columns = change.b.transposed().floats()
                let scale = Float(adapter.scaling.scale)
                for (index, value) in columns.enumerated() {
                    let place = index / own * rank + index % own
                    b[layer * sizes.b + place] = HalfFloat.bits(of: scale * value)
                }
            }
            slots.append(
                Slot(name: names.a, shape: [target.layerCount, rank, shape.inputs], bits: a))
            slots.append(
                Slot(name: names.b, shape: [target.layerCount, shape.outputs, rank], bits: b))
        }
        self.slots = slots.sorted { $0.name < $1.name }
    }

    /// A manifest may lie about its shapes; no slot has more than a thousand million numbers.
    private static func checkSize(
        _ layers: Int, _ rank: Int, _ shape: (outputs: Int, inputs: Int)
    ) throws {
        for width in [shape.inputs, shape.outputs] {
            let sizes = [layers, rank, width]
            let most = 1_000_000_000
            let product = sizes.reduce((partialValue: 1, overflow: false)) { so, next in
                let product = so.partialValue.multipliedReportingOverflow(by: next)
                return (product.partialValue, so.overflow || product.overflow)
            }
            if sizes.contains(where: { $0 < 0 }) || product.overflow || product.partialValue > most
            {
                throw Phi3Error.manifest(
                    ProblemList(
                        path: Manifest.fileName, what: "describes adapter slots that no model has",
                        problems: ["\(layers) layers, rank \(rank), width \(width)"],
                        advice: "Export the bundle again."))
            }
        }
    }
}
