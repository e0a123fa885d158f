import Foundation
import MedPhiKit

/// `verify`: is a bundle whole, and does this machine compute with it what MLX computed.
enum Verify {
    static let verb = Verb(
        name: "verify",
        summary: "Check a bundle: every file, its tokenizer, and what it computes here.",
        places: [Verb.Place(name: "BUNDLE", help: "A bundle NAME.medphi.")],
        options: [
            Verb.Option(
                "level", "files|compute",
                "files: hashes, manifest and tokenizer; compute: the golden logits too [default: "
                    + "compute, or files where the bundle has none]."),
            Verb.backend, Verb.json,
        ],
        examples: [
            "medphi-kit verify notes.medphi", "medphi-kit verify notes.medphi --level files",
            "medphi-kit verify notes.medphi --backend coreml --json   # on a Mac or an iPhone",
        ],
        run: run)

    private static func run(_ arguments: Arguments, _ console: Console) async throws -> Int32 {
        let url = try arguments.url("BUNDLE")
        let level = arguments.text("level")
        guard level == nil || level == "files" || level == "compute" else {
            throw UsageFailure(
                "--level is '\(Console.shown(level ?? ""))', expected files or compute")
        }
        _ = try arguments.backend()
        let clock = ContinuousClock()
        let begin = clock.now
        var report = Report(bundle: url.lastPathComponent)
        do {
            try await check(url, level, arguments, console, &report)
        } catch let error as Phi3Error {
            report.findings.append(error.details.description)
            // What cannot be looked at all is an error; what is looked at and bad is a finding.
            if !report.isOpen, !arguments.has("json") { throw error }
        }
        report.seconds = (clock.now - begin).seconds
        console.print(arguments.has("json") ? report.json.text(.pretty) : report.text)
        if report.passed { return 0 }
        console.fail(
            "\(url.path): \(report.all[0])"
                + (report.all.count > 1 ? " (and \(report.all.count - 1) more)" : ""))
        return 1
    }

    private static func check(
        _ url: URL, _ level: String?, _ arguments: Arguments, _ console: Console,
        _ report: inout Report
    ) async throws {
        console.note("checking files …")
        let bundle = try ModelBundle.open(url) { _, _ in try Task.checkCancellation() }
        report.opened(bundle)
        // What is not computed must at least be what `Phi3.load` takes.
        report.vectors = try BundleCheck.run(bundle)
        let hasGolden = FileBytes.kind(of: bundle.parity) == .file
        guard level == "compute" || (level == nil && hasGolden) else { return }
        // The files were just checked.
        let model = try await Reading.model(
            url, arguments, console, options: LoadOptions(verify: false))
        report.backend = model.backendName
        let last = LastLine()
        report.parity = try await model.checkParity { done, total in
            let line = "compared \(done) of \(total) …"
            if last.isNew(line) { console.note(line) }
        }
    }
}

extension Verify {
    /// Everything that was checked, in the form that `medphi verify --json` of the Python package
    /// prints: what this tool does not look at is null.
    struct Report {
        let bundle: String
        var isOpen = false
        var files = 0
        var bytes = 0
        var exported = Manifest.Verification.Level.none
        var vectors: Int?
        var backend: String?
        var parity: ParityReport?
        var findings: [String] = []
        var seconds = 0.0

        init(bundle: String) { self.bundle = bundle }

        mutating func opened(_ bundle: ModelBundle) {
            isOpen = true
            files = bundle.manifest.medphi.files.count + 1
            bytes = bundle.byteCount
            exported = bundle.manifest.medphi.verification.level
        }

        var all: [String] { findings + (parity?.findings ?? []) }
        var passed: Bool { all.isEmpty }

        /// "predict" means Apple's Core ML, as in the manifest; everything else is "graph".
        private var level: String {
            guard parity != nil else { return "spec" }
            #if canImport(Darwin)
                return backend == "core-ml" ? "predict" : "graph"
            #else
                return "graph"
            #endif
        }

        var json: JSONValue {
            let figures = parity?.json ?? .null
            return [
                "bundle": .string(bundle), "level": .string(level), "passed": .bool(passed),
                "backend": backend.map { .string($0) } ?? .null,
                "files": .integer(files), "bytes": .integer(bytes),
                "vectors": vectors.map { .integer($0) } ?? .null, "spec": .null,
                "graph": level == "graph" ? figures : .null,
                "predict": level == "predict" ? figures : .null,
                "findings": .array(all.map { .string($0) }),
                "seconds": .number((seconds * 1000).rounded() / 1000),
            ]
        }

        var text: String {
            var lines = [
                "\(bundle): \(passed ? "passed" : "NOT passed"), in "
                    + String(format: "%.1f s", seconds)
            ]
            if isOpen {
                lines.append("files: \(files), \(Console.size(bytes)), every hash is right")
            }
            if let vectors { lines.append("tokenizer: \(vectors) test cases, all of them agree") }
            if let parity { lines.append(table(parity)) }
            if parity == nil, passed {
                lines.append(
                    "nothing was computed: that was asked for, or is all it was exported for")
            }
            return (lines + all.map { "  \($0)" }).joined(separator: "\n")
        }

        private func table(_ parity: ParityReport) -> String {
            var rows = [["case", "rows", "largest error", "KL, nats", "same first", "greedy"]]
            rows += parity.cases.map { item in
                [
                    item.name, "\(item.rows)", String(format: "%.4f", item.largestDifference),
                    String(format: "%.1e", item.kl),
                    String(format: "%.1f%%", item.sameFirst * 100),
                    item.greedy.map { $0 ? "yes" : "no" } ?? "-",
                ]
            }
            let widths = rows[0].indices.map { at in rows.map { $0[at].count }.max() ?? 0 }
            let swaps = parity.swaps == true ? "; adapters in, out and in again: bit for bit" : ""
            let lines = rows.map { row in
                zip(row, widths).map { $0.padding(toLength: $1, withPad: " ", startingAt: 0) }
                    .joined(separator: "  ")
            }
            return "\(parity.backend): a prompt at once against token by token differs by "
                + String(format: "%.2f%%", parity.prefillDecode * 100)
                + " of the largest logit\(swaps)\n" + lines.joined(separator: "\n")
        }
    }
}
