import Foundation
import Testing

@testable import Phi3Core

@Suite("Conversations and prompts", .enabled(if: Vectors.hasRecorded, "no checkout around"))
struct NotesTests {
    @Test("messy transcripts are read as Python reads them")
    func conversations() throws {
        for item in try Vectors.cases("conversations") {
            let text = try #require(item["text"]?.string)
            guard let turns = item["turns"]?.array else {
                #expect(throws: Phi3Error.self) { try Conversation(text: text) }
                continue
            }
            let found = try Conversation(text: text).turns.flatMap { [$0.speaker, $0.text] }
            let expected = turns.flatMap { $0.array ?? [] }.compactMap(\.string)
            #expect(found.map { Array($0.utf8) } == expected.map { Array($0.utf8) })
        }
    }

    @Test("a conversation read from its own text is the same")
    func roundTrip() throws {
        for item in try Vectors.cases("conversations") {
            let text = try #require(item["text"]?.string)
            guard let made = try? Conversation(text: text) else { continue }
            #expect(same(try Conversation(text: made.text).text, made.text))
        }
    }

    @Test("long texts are shortened by Python's rule")
    func shortened() throws {
        func count(_ text: String) -> Int {
            3 + PythonText.words(text).count { !$0.allSatisfy(PythonText.isSpace) }
                + text.unicodeScalars.count { $0 == "\n" }
        }
        for item in try Vectors.cases("shortened") {
            let turns = try #require(item["turns"]?.array).compactMap(\.string)
            let room = try #require(item["room"]?.integer)
            let made = Shortener(turns: turns, noun: "turn", room: room, count: count).shortened()
            guard let expected = item["short"]?.array else {
                #expect(made == nil)
                continue
            }
            #expect(same(made?.text ?? "", expected[0].string ?? "-"))
            #expect(made?.leftOutTurns == expected[1].integer)
            #expect(made?.leftOutWords == expected[2].integer)
        }
    }

    @Test("prompts in too little room are Python's ids")
    func prompts() throws {
        let tokenizer = try Tokenizer.load(directory: Vectors.tiny)
        for item in try Vectors.cases("prompts") {
            let conversation = try Conversation(text: #require(item["text"]?.string))
            let room = try #require(item["room"]?.integer)
            func encode() throws -> EncodedPrompt {
                try tokenizer.encodePrompt(
                    conversation, section: item["section"]?.string, maxLength: room + 16,
                    reserve: 16)
            }
            guard let expected = item["made"]?.array?.compactMap(\.integer) else {
                let error = #expect(throws: Phi3Error.self) { try encode() }
                guard case .contextOverflow = error else {
                    Issue.record("\(String(describing: error))")
                    continue
                }
                continue
            }
            let made = try encode()
            let checksum = made.ids.reduce(0) { ($0 * 1_000_003 + Int($1) + 1) % (1 << 31 - 1) }
            #expect(
                [made.ids.count, checksum, made.leftOutTurns, made.leftOutWords] == expected)
            #expect(made.ids.count <= room)
        }
    }

    @Test("note prompts are read back, and nothing else is")
    func parsed() throws {
        for item in try Vectors.cases("parsed") {
            let found = NotePrompt.parse(try #require(item["text"]?.string))
            guard let expected = item["parsed"]?.array else {
                #expect(found == nil)
                continue
            }
            #expect(same(found?.conversation ?? "-", expected[0].string ?? ""))
            #expect(same(found?.section ?? "-", expected[1].string ?? "-"))
        }
    }

    @Test(
        "a section that is no name is refused",
        arguments: ["", " ", "A ", "A\nB", "\rA", "\u{1C}A"])
    func sections(_ section: String) {
        #expect(throws: Phi3Error.self) { try NotePrompt.user(conversation: "a", section: section) }
    }

    @Test("a conversation without words, and negative room, are refused")
    func emptyConversation() throws {
        let tokenizer = try Tokenizer.load(directory: Vectors.mini)
        let empty = try Conversation(text: " \n\u{200B}")
        for (conversation, reserve) in [(empty, 1), (try Conversation(text: "a"), -1)] {
            #expect(throws: Phi3Error.self) {
                try tokenizer.encodePrompt(conversation, maxLength: 100, reserve: reserve)
            }
        }
    }

    @Test("numbers that cannot be meant are an error, not an overflow")
    func absurdRoom() throws {
        let tokenizer = try Tokenizer.load(directory: Vectors.mini)
        let conversation = try Conversation(text: "Doctor: a")
        for (length, reserve) in [(0, Int.max), (1, Int.max - 1), (Int.max, Int.max), (0, 0)] {
            let error = #expect(throws: Phi3Error.self) {
                try tokenizer.encodePrompt(conversation, maxLength: length, reserve: reserve)
            }
            #expect(error?.description.contains("at most 0") == true)
        }
        let most = try tokenizer.encodePrompt(conversation, maxLength: .max, reserve: 0)
        #expect(most.leftOutTurns == 0)
    }

    @Test("a line that comes often is counted once")
    func repeatedLines() throws {
        // Canonically equivalent lines of different length are two.
        let turns = Array(repeating: "", count: 500) + ["\u{E9}", "e\u{301}", "\u{E9}"]
        var counted: [[UInt8]] = []
        let shortener = Shortener(turns: turns, noun: "line", room: 60) { text in
            counted.append(Array(text.utf8))
            return text.unicodeScalars.count
        }
        let short = try #require(shortener.shortened())
        #expect(short.text.unicodeScalars.count <= 60)
        #expect(counted.count < 30)
        for line in ["\u{E9}", "e\u{301}"] { #expect(counted.contains(Array("\n\(line)".utf8))) }
    }

    @Test("turns are checked when they are made and when they are read from JSON")
    func turns() throws {
        #expect(throws: Phi3Error.self) { try Turn(speaker: "Plumber", text: "a") }
        #expect(throws: Phi3Error.self) { try Turn(speaker: "Doctor", text: "a\nb") }
        #expect(try Turn(speaker: "Doctor_12", text: "a", start: 1.5).start == 1.5)
        let conversation = Conversation(turns: [try Turn(speaker: "Patient", text: "b", end: 2)])
        let data = try JSONEncoder().encode(conversation)
        #expect(try JSONDecoder().decode(Conversation.self, from: data) == conversation)
        let wrong = Data(#"{"turns": [{"speaker": "Plumber", "text": "a"}]}"#.utf8)
        #expect(throws: Phi3Error.self) { try JSONDecoder().decode(Conversation.self, from: wrong) }
    }

    @Test("descriptions and errors never show what was said")
    func privacy() throws {
        let conversation = try Conversation(text: "Doctor: secret\nPatient: words here")
        #expect("\(conversation)" == "Conversation(2 turns, 3 words)")
        #expect("\(conversation.turns[0])" == "Turn(Doctor, 1 words)")
        #expect(throws: Phi3Error.self) { try Conversation(utf8: Data([0x61, 0xFF])) }
    }

    @Test(
        "a tag may have 24 letters, and a dot behind it only if it cannot end a sentence",
        arguments: [
            ("physician______assistant: x", "Guest_clinician"),
            ("physician_______assistant: x", nil),
            ("[physician______assistant] x", "Guest_clinician"),
            ("[physician_______assistant] x", nil),
            ("physician______assistant2 : x", "Guest_clinician_2"),
            ("Guest_family2. x", "Guest_family_2"), ("Guest_family.x", nil),
            ("Gu_family. x", nil), ("Doctor. x", nil),
        ])
    func tags(_ line: String, _ speaker: String?) {
        let found = Speakers.splitTag(Array(line.unicodeScalars))
        #expect(found?.speaker == speaker)
        #expect(found == nil || found?.rest == ["x"])
    }

    @Test("a prompt without a section's name is no note prompt")
    func noSection() {
        let text = "Write the  section of the clinical note for this conversation. "
        #expect(NotePrompt.parse(text + "Use only what was said.\n\nx") == nil)
    }

    @Test(
        "similarity of tags is difflib's",
        arguments: [
            ("doctor", "docotr", 5.0 / 6), ("patient", "pateint", 6.0 / 7), ("doctor", "", 0.0),
            ("abcd", "bcde", 0.75), ("guest_family", "guest_famly", 22.0 / 23),
        ])
    func similarity(_ a: String, _ b: String, _ expected: Double) {
        let found = Speakers.ratio(Array(a.unicodeScalars), Array(b.unicodeScalars))
        #expect(abs(found - expected) < 1e-12)
    }
}
