import Foundation
import MedPhiKit

/// `generate`: a conversation in, its note out, piece by piece.
enum Generate {
    static let sampling = [
        Verb.Option(
            "max-tokens", "N",
            "The longest note, in tokens [default: 512, at most half of the context]."),
        Verb.Option("temperature", "X", "0 takes the likeliest token each time [default: 0]."),
        Verb.Option("top-p", "X", "Keep the likeliest tokens of this probability [default: 1]."),
        Verb.Option(
            "top-k", "N", "Keep so many of the likeliest tokens; 0 keeps all [default: 0]."),
        Verb.Option("min-p", "X", "Drop tokens below this share of the likeliest [default: 0]."),
        Verb.Option("repetition-penalty", "X", "Above 1: say less twice [default: 1]."),
        Verb.Option("seed", "N", "Start of the random numbers [default: 0]."),
    ]

    static let verb = Verb(
        name: "generate", summary: "Write the note of a conversation.",
        places: [
            Verb.model,
            Verb.Place(
                name: "CONVERSATION",
                help: "A text with one 'Doctor: …' line per turn; - reads a pipe."),
        ],
        options: [
            Verb.Option("adapter", "NAME|FILE", "An adapter of the bundle, or a file or folder."),
            Verb.Option("section", "NAME", "Part of the note to write, e.g. GENHX [default: all]."),
        ] + sampling + [
            Verb.Option("no-shorten", nil, "Refuse a conversation longer than the context."),
            Verb.Option("ids", nil, "Print the note's token ids instead of its text."),
            Verb.backend, Verb.json,
        ],
        examples: [
            "medphi-kit generate notes.medphi visit.txt --adapter notes",
            "medphi-kit generate notes.medphi - --section GENHX --max-tokens 200 < visit.txt",
            "medphi-kit generate models/phi-3-mini visit.txt --adapter medical_changes.safetensors",
        ],
        run: run)

    private static func run(_ arguments: Arguments, _ console: Console) async throws -> Int32 {
        let url = try arguments.url("MODEL")
        let options = NoteOptions(
            generation: try generation(arguments), shortens: !arguments.has("no-shorten"))
        try arguments.requireFilled("adapter")
        let spoken = try await conversation(arguments, console)
        let section = arguments.text("section")
        do {
            _ = try NotePrompt.parts(section: section)
        } catch {
            throw UsageFailure("--section: \(error.details.found)")
        }
        let model = try await Reading.adapted(
            Reading.model(url, arguments, console), arguments)
        let stream = model.generateNote(from: spoken, section: section, options: options)
        let streams = !arguments.has("json") && !arguments.has("ids")
        var wrote = false
        for try await event in stream {
            switch event {
            case .started(let start): report(start, console)
            case .delta(let text, _) where streams:
                try console.write(text)
                wrote = true
            default: break
            }
        }
        if wrote { try console.write("\n") }
        let result = try await stream.result
        if arguments.has("json") {
            console.print(json(result, model, arguments))
        } else if arguments.has("ids") {
            console.print(result.completion.ids.map(String.init).joined(separator: " "))
        }
        report(result.completion, console)
        return result.completion.stopReason == .cancelled ? 130 : 0
    }

    /// How the text is written, as typed.
    static func generation(_ arguments: Arguments) throws -> GenerationOptions {
        let sampling = SamplingOptions(
            temperature: try arguments.number("temperature", or: 0),
            topK: try arguments.whole("top-k", or: 0, 0...Int.max),
            topP: try arguments.number("top-p", or: 1),
            minP: try arguments.number("min-p", or: 0),
            repetitionPenalty: try arguments.number("repetition-penalty", or: 1),
            seed: UInt64(try arguments.whole("seed", or: 0, 0...Int.max)))
        let options = GenerationOptions(
            sampling: sampling,
            maxTokens: try arguments.text("max-tokens").map { _ in
                try arguments.whole("max-tokens", or: 0, 1...Int.max)
            })
        try options.validate()
        return options
    }

    private static func conversation(
        _ arguments: Arguments, _ console: Console
    ) async throws -> Conversation {
        let path = arguments.place("CONVERSATION") ?? "-"
        if path.isEmpty { throw UsageFailure("CONVERSATION is empty") }
        let place = path == "-" ? "standard input" : path
        let data = try Reading.bytes(path, console)
        if data.count >= 1_000_000 {
            console.note("reading the conversation: \(Console.size(data.count))")
        }
        let spoken = try await Reading.stoppable {
            try Reading.conversation(Reading.text(data, place), place)
        }
        guard !spoken.turns.isEmpty else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: place, found: "no words in it",
                    expected: "lines such as 'Doctor: How are you?'",
                    advice: "Give the text of a conversation."))
        }
        return spoken
    }

    private static func report(_ start: NoteStart, _ console: Console) {
        var line = "prompt: \(start.promptTokens) tokens"
        if !start.isWhole {
            line +=
                "; the context is too short for all of it: \(start.leftOutTurns) turns and "
                + "\(start.leftOutWords) words were left out"
        }
        console.note(line)
    }

    private static func report(_ completion: Completion, _ console: Console) {
        let times = completion.timings
        let peak = times.peakBytes.map { "; at most \(Console.size($0)) of memory" } ?? ""
        console.note(
            "note: \(completion.ids.count) tokens, \(reason(completion.stopReason)); "
                + "first token after "
                + Console.number(times.timeToFirstToken, decimals: 2, unit: " s") + ", prompt "
                + Console.number(times.prefillTokensPerSecond, decimals: 1, unit: " tokens/s")
                + ", note "
                + Console.number(times.decodeTokensPerSecond, decimals: 1, unit: " tokens/s")
                + peak)
        console.note("A clinician must read and correct it before anyone relies on it.")
    }

    /// Why a text ended, with the names of the Python package where it has one.
    static func reason(_ reason: StopReason) -> String {
        switch reason {
        case .endOfTurn, .stopString: "stop"
        case .maxTokens, .contextFull: "length"
        case .cancelled: "cancelled"
        }
    }

    private static func json(
        _ result: NoteStream.Result, _ model: Phi3, _ arguments: Arguments
    ) -> JSONValue {
        let completion = result.completion
        let times = completion.timings
        var value: JSONObject = [
            "note": .string(result.note.text), "prompt_tokens": .integer(completion.promptTokens),
            "note_tokens": .integer(completion.ids.count),
            "finish_reason": .string(reason(completion.stopReason)),
            "left_out_turns": .integer(result.start.leftOutTurns),
            "left_out_words": .integer(result.start.leftOutWords),
            "backend": .string(model.backendName),
            "adapter": result.note.adapter.map { .string($0.name) } ?? .null,
            "timings": [
                "time_to_first_token": .number(times.timeToFirstToken),
                "prefill_tokens_per_second": .number(times.prefillTokensPerSecond),
                "decode_tokens_per_second": .number(times.decodeTokensPerSecond),
                "peak_bytes": times.peakBytes.map { .integer($0) } ?? .null,
            ],
        ]
        if arguments.has("ids") {
            value["ids"] = .array(completion.ids.map { .integer(Int($0)) })
        }
        return .object(value)
    }
}
