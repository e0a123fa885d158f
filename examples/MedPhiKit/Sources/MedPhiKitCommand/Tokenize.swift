import Foundation
import MedPhiKit

/// `tokenize`: text to ids and back.
enum Tokenize {
    static let verb = Verb(
        name: "tokenize", summary: "Turn text into token ids, or ids into text.",
        places: [
            Verb.Place(
                name: "MODEL",
                help: "A bundle, a checkpoint, or a folder with tokenizer.json."),
            Verb.Place(
                name: "TEXT", help: "The text, or the ids with --ids; - or nothing reads a pipe.",
                isOptional: true),
        ],
        options: [
            Verb.Option("ids", nil, "TEXT is ids, apart by spaces or commas; print their text."),
            Verb.Option(
                "chat", nil,
                "TEXT is a chat: a JSON list of {\"role\", \"content\"}, or the one message of a "
                    + "user; print the ids the model goes on from."),
            Verb.json,
        ],
        examples: [
            "medphi-kit tokenize notes.medphi 'Doctor: any fever?'",
            "medphi-kit tokenize notes.medphi --ids '381 284 383'",
            "medphi-kit tokenize notes.medphi --chat --json < messages.json",
        ],
        run: run)

    private static func run(_ arguments: Arguments, _ console: Console) async throws -> Int32 {
        if arguments.has("ids"), arguments.has("chat") {
            throw UsageFailure("--ids and --chat do not go together")
        }
        let url = try arguments.url("MODEL")
        let tokenizer = try Reading.tokenizer(url)
        var text = arguments.place("TEXT") ?? "-"
        if text == "-" { text = try Reading.text(Reading.bytes("-", console), "standard input") }
        if arguments.has("ids") {
            try decode(text, tokenizer, arguments, console)
            return 0
        }
        let ids =
            arguments.has("chat")
            ? try tokenizer.encodeChat(chat(text)) : tokenizer.encode(text)
        if arguments.has("json") {
            let entries = ids.map { JSONValue.string(tokenizer.entry($0) ?? "") }
            console.print(
                [
                    "ids": .array(ids.map { .integer(Int($0)) }), "count": .integer(ids.count),
                    "tokens": .array(entries),
                ] as JSONValue)
        } else {
            console.print(ids.map(String.init).joined(separator: " "))
        }
        return 0
    }

    private static func decode(
        _ text: String, _ tokenizer: Tokenizer, _ arguments: Arguments, _ console: Console
    ) throws {
        let words = text.split { $0 == "," || $0 == "[" || $0 == "]" || $0.isWhitespace }
        let ids = try words.enumerated().map { at, word in
            // The word may be a piece of a conversation, so it is not shown.
            guard let id = Int32(word), id >= 0, Int(id) < tokenizer.vocabularySize else {
                throw UsageFailure(
                    "TEXT: word \(at + 1) of \(words.count) is no id; expected 0 to "
                        + "\(tokenizer.vocabularySize - 1)")
            }
            return id
        }
        let decoded = tokenizer.decode(ids, skipSpecial: false)
        if arguments.has("json") {
            console.print(["text": .string(decoded), "count": .integer(ids.count)] as JSONValue)
        } else {
            console.print(decoded)
        }
    }

    /// Messages as JSON, or a user's only one.
    private static func chat(_ text: String) throws -> [ChatMessage] {
        guard text.drop(while: \.isWhitespace).first == "[" else {
            return [ChatMessage(role: .user, content: text)]
        }
        let items = try? JSONValue(parsing: text).array
        let messages = (items ?? []).compactMap { item -> ChatMessage? in
            guard let role = item["role"]?.string.flatMap(ChatRole.init),
                let content = item["content"]?.string
            else { return nil }
            return ChatMessage(role: role, content: content)
        }
        guard let items, messages.count == items.count, !items.isEmpty else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: "the chat", found: "no list of messages",
                    expected: #"[{"role": "user", "content": "…"}] with the roles system, user, "#
                        + "assistant",
                    advice: "Write the list so, or give the text of one message."))
        }
        return messages
    }
}
