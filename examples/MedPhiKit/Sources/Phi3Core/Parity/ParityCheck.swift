import Foundation

extension Phi3 {
    /// Compares what this backend computes on this device with what MLX computed when the bundle was
    /// exported, by the limits that the bundle states. Adapters of the bundle are put on and taken
    /// off on the way; the handle stays as it is.
    ///
    /// - Parameter progress: is told how many steps are done, and of how many.
    /// - Returns: the figures; what is beyond a limit is a finding, not an error.
    /// - Throws: `Phi3Error`: no bundle, no or damaged golden logits, a backend that fails; or
    ///   `CancellationError`.
    public func checkParity(
        progress: (@Sendable (_ done: Int, _ total: Int) -> Void)? = nil
    ) async throws -> ParityReport {
        guard let bundle else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: info.name, found: "a checkpoint", expected: "a bundle",
                    advice: "Export it: only bundles hold what MLX computed."))
        }
        let golden = try GoldenLogits.read(bundle)
        return try await ParityCheck(
            model: removingLoRA(), golden: golden,
            switchLength: bundle.manifest.medphi.model.rope.switchLength
        ).run(progress ?? { _, _ in })
    }

    func logits(after ids: some Collection<Int32>) async throws -> [Float] {
        try await engine.logits(after: Array(ids), adapter: adapter)
    }
}

/// Runs every case of a bundle's golden logits and compares.
struct ParityCheck {
    /// The base.
    let model: Phi3
    let golden: GoldenLogits
    /// The length from which other rotary factors hold for all of a text.
    let switchLength: Int?

    private typealias Rows = [(at: Int, logits: [Float])]

    func run(_ progress: (Int, Int) -> Void) async throws -> ParityReport {
        let total = golden.cases.count + 2
        var found: [(GoldenLogits.Case, Rows)] = []
        for item in golden.cases {
            found.append((item, try await rows(item)))
            progress(found.count, total)
        }
        let cases = found.map { ParityReport.Case($0, $1) }
        let apart = try await prefillAgainstDecode(golden.cases[0])
        progress(total - 1, total)
        let swaps = try await swapped()
        progress(total, total)
        var findings = cases.flatMap(\.findings) + withoutEffect(found)
        if !(apart <= golden.cases[0].limits.error) {
            findings.append("prefill and decode differ by \(percent(apart)) of the largest logit")
        }
        if swaps == false {
            findings.append("an adapter taken out and put in again gives other logits")
        }
        return ParityReport(
            backend: model.backendName, cases: cases, prefillDecode: apart, swaps: swaps,
            findings: findings)
    }

    private func model(_ adapter: String?) async throws -> Phi3 {
        guard let adapter else { return model }
        return try await model.applyLoRA(.named(adapter))
    }

    /// The logits of a case, read as an app reads it: the prompt in blocks, then token by token.
    private func rows(_ item: GoldenLogits.Case) async throws -> Rows {
        let model = try await model(item.adapter)
        let ids = item.read
        var rows: Rows = []
        for (at, row) in item.rows.enumerated() {
            // MLX read all of it with one set of rotary factors; before the switch it is the other.
            if let switchLength, ids.count > switchLength, row < switchLength { continue }
            try Task.checkCancellation()
            rows.append((at, try await model.logits(after: ids[...row])))
        }
        return rows
    }

    /// Adapters whose change of the logits is not the one MLX sees: a weak one is within the limits
    /// of the base, but rounding has no direction.
    private func withoutEffect(_ found: [(GoldenLogits.Case, Rows)]) -> [String] {
        found.compactMap { item, rows in
            guard item.adapter != nil,
                let (base, plain) = found.first(where: {
                    $0.0.adapter == nil && $0.0.prompt == item.prompt && $0.0.ids == item.ids
                })
            else { return nil }
            var (along, length) = (0.0, 0.0)
            for (row, other) in zip(rows, plain) where item.rows[row.at] < item.ids.count {
                let (wanted, plain) = (item.row(row.at), base.row(other.at))
                for at in wanted.indices {
                    let change = wanted[at] - plain[at]
                    along += change * (Double(row.logits[at]) - Double(other.logits[at]))
                    length += change * change
                }
            }
            let share = length > 0 ? along / length : 0
            if (0.5...2).contains(share) { return nil }
            return
                "\(printable(item.name)): the adapter changes the logits by \(percent(share)) of "
                + "what it does in MLX"
        }
    }

    /// Eight tokens at once against one by one, then a token more on both.
    private func prefillAgainstDecode(_ item: GoldenLogits.Case) async throws -> Double {
        let model = try await model(item.adapter)
        let ids = Array(item.ids.prefix(9))
        func fresh() async throws {
            // A sequence that begins otherwise; nothing of the one before is used again.
            _ = try await model.logits(after: [ids[0] == 0 ? 1 : 0])
        }
        let ends = Set([min(8, ids.count), ids.count]).sorted()
        try await fresh()
        var blocks: [[Float]] = []
        for end in ends { blocks.append(try await model.logits(after: ids[..<end])) }
        try await fresh()
        var apart = 0.0
        for end in 1...ids.count {
            let step = try await model.logits(after: ids[..<end])
            guard let at = ends.firstIndex(of: end) else { continue }
            let row = RowDifference(blocks[at].map(Double.init), step.map(Double.init))
            apart = RowDifference.worse(apart, row.apart / row.largest)
        }
        return apart
    }

    /// Base, each adapter, base again, each adapter again: bit for bit.
    private func swapped() async throws -> Bool? {
        let names = Set(golden.cases.compactMap(\.adapter)).sorted()
        if names.isEmpty { return nil }
        var models = [model]
        for name in names { models.append(try await model(name)) }
        let ids = golden.cases[0].ids.prefix(4)
        var seen: [[Float]] = []
        var same = true
        for round in 0..<2 {
            for (at, model) in models.enumerated() {
                let logits = try await model.logits(after: ids)
                if round == 0 { seen.append(logits) }
                same = same && logits.map(\.bitPattern) == seen[at].map(\.bitPattern)
            }
        }
        return same
    }
}
