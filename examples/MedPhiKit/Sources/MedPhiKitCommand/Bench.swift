import Foundation
import MedPhiKit

/// `bench`: how fast a model loads, reads and writes on this machine.
enum Bench {
    static let verb = Verb(
        name: "bench", summary: "Measure loading, reading and writing on this machine.",
        places: [Verb.model],
        options: [
            Verb.Option("adapter", "NAME|FILE", "An adapter of the bundle, or a file or folder."),
            Verb.Option("prompt", "N", "Tokens to read [default: 128, or what the context has]."),
            Verb.Option("tokens", "N", "Tokens to write [default: 32]."),
            Verb.Option(
                "repeat", "N", "How often, after one run that does not count [default: 3]."),
            Verb.backend, Verb.json,
        ],
        examples: [
            "medphi-kit bench notes.medphi", "medphi-kit bench notes.medphi --backend reference",
            "medphi-kit bench notes.medphi --prompt 256 --tokens 64 --repeat 5 --json",
        ],
        run: run)

    private static func run(_ arguments: Arguments, _ console: Console) async throws -> Int32 {
        let url = try arguments.url("MODEL")
        let wanted = try arguments.whole("prompt", or: 128, 1...1_000_000)
        let tokens = try arguments.whole("tokens", or: 32, 2...1_000_000)
        let rounds = try arguments.whole("repeat", or: 3, 1...1000)
        try arguments.requireFilled("adapter")
        let clock = ContinuousClock()
        let begin = clock.now
        let model = try await Reading.adapted(
            Reading.model(url, arguments, console), arguments)
        let load = (clock.now - begin).seconds
        let length = min(wanted, model.contextLength - tokens)
        guard length > 0 else {
            throw UsageFailure(
                "--tokens is \(tokens), expected fewer than the context's \(model.contextLength)")
        }
        var runs: [Timings] = []
        for round in 0...rounds {
            let timings = try await write(model, prompt(model, length, round), tokens)
            if round > 0 { runs.append(timings) }
            console.note("run \(round) of \(rounds)\(round == 0 ? ", not counted" : "")")
        }
        let report = Report(
            model: model, load: load, encode: encoding(model.tokenizer), prompt: length,
            tokens: tokens, runs: runs)
        if arguments.has("json") {
            console.print(report.json)
        } else {
            console.print(report.text)
        }
        return 0
    }

    /// Ids that differ from round to round, so that nothing of the round before is used again.
    private static func prompt(_ model: Phi3, _ length: Int, _ round: Int) -> [Int32] {
        let text = model.tokenizer.encode("Doctor: How are you today? Patient: Better, thank you. ")
        var ids = [model.tokenizer.userID]
        for at in 0..<max(0, length - 1) { ids.append(text[(at + round) % max(1, text.count)]) }
        return ids
    }

    private static func write(
        _ model: Phi3, _ prompt: [Int32], _ tokens: Int
    ) async throws -> Timings {
        // A high temperature hardly ever ends a text early.
        let options = GenerationOptions(
            sampling: SamplingOptions(temperature: 10, seed: UInt64(prompt.count)),
            maxTokens: tokens)
        let completion = try await model.respond(to: .ids(prompt), options)
        try Task.checkCancellation()
        return completion.timings
    }

    /// Characters of a consultation of some twenty minutes.
    private static let transcript = 15_000

    /// Seconds that the tokens of a long conversation take: the middle one of twenty times.
    private static func encoding(_ tokenizer: Tokenizer) -> Double {
        let line = "Doctor: How long has that been going on?\nPatient: Since Monday, I think.\n"
        let text = String(
            String(repeating: line, count: transcript / line.count + 1).prefix(transcript))
        let clock = ContinuousClock()
        let times = (0..<20).map { _ in clock.measure { _ = tokenizer.encode(text) }.seconds }
        return times.sorted()[times.count / 2]
    }

    /// The figures of all runs.
    private struct Report {
        let model: Phi3
        let load: Double
        let encode: Double
        let prompt: Int
        let tokens: Int
        let runs: [Timings]

        /// The middle one, the least and the most.
        private func spread(_ values: [Double]) -> (middle: Double, least: Double, most: Double) {
            let sorted = values.sorted()
            return (sorted[sorted.count / 2], sorted[0], sorted[sorted.count - 1])
        }

        private var peak: Int? { runs.compactMap(\.peakBytes).max() }

        var json: JSONValue {
            func value(_ values: [Double]) -> JSONValue {
                let spread = spread(values)
                return [
                    "median": .number(spread.middle), "min": .number(spread.least),
                    "max": .number(spread.most),
                ]
            }
            return [
                "model": .string(model.info.name), "backend": .string(model.backendName),
                "adapter": model.activeAdapter.map { .string($0.name) } ?? .null,
                "prompt_tokens": .integer(prompt), "new_tokens": .integer(tokens),
                "runs": .integer(runs.count), "load_seconds": .number(load),
                "encode_characters": .integer(Bench.transcript),
                "encode_seconds": .number(encode),
                "prefill_tokens_per_second": value(runs.map(\.prefillTokensPerSecond)),
                "decode_tokens_per_second": value(runs.map(\.decodeTokensPerSecond)),
                "time_to_first_token": value(runs.map(\.timeToFirstToken)),
                "peak_bytes": peak.map { .integer($0) } ?? .null,
            ]
        }

        var text: String {
            func line(_ values: [Double], _ unit: String) -> String {
                let spread = spread(values)
                return Console.number(spread.middle, decimals: 1, unit: " \(unit) (")
                    + Console.number(spread.least, decimals: 1) + " to "
                    + Console.number(spread.most, decimals: 1) + ")"
            }
            return Console.table([
                ("model", "\(model.info.name), backend \(model.backendName)"),
                ("load", String(format: "%.2f s, checks included", load)),
                (
                    "tokenizer",
                    "\(Bench.transcript) characters in "
                        + Console.number(encode * 1000, decimals: 1, unit: " ms")
                ),
                (
                    "prompt",
                    "\(prompt) tokens, "
                        + line(runs.map(\.prefillTokensPerSecond), "tokens/s")
                ),
                (
                    "note",
                    "up to \(tokens) tokens, "
                        + line(runs.map(\.decodeTokensPerSecond), "tokens/s")
                ),
                ("peak memory", peak.map(Console.size) ?? "not known"),
                ("runs", "\(runs.count); the middle one, the least and the most"),
            ])
        }
    }
}
