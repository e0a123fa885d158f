/// The note prompt, in the one place that knows it; the same words as in training.
public enum NotePrompt {
    private static let rule = "for this conversation. Use only what was said."
    private static let whole = "Write the clinical note \(rule)\n\n"
    private static let sectionHead = "Write the "
    private static let sectionTail = " section of the clinical note \(rule)"

    /// What stands before and after the conversation in the user's message.
    ///
    /// - Parameter section: the part of the note to write, as `GENHX`; nil for the whole note.
    /// - Throws: `Phi3Error.input`: the section is empty, padded with spaces, or has a line break.
    public static func parts(
        section: String?
    ) throws(Phi3Error) -> (before: String, after: String) {
        guard let section else { return (whole, "") }
        let scalars = Array(section.unicodeScalars)
        guard !scalars.isEmpty, PythonText.stripped(scalars) == scalars,
            !scalars.contains(where: { $0 == "\n" || $0 == "\r" })
        else {
            throw Phi3Error.input(
                ErrorDetails(
                    place: "a section name",
                    found: "empty, padded with spaces, or longer than one line",
                    expected: "one line such as GENHX, or no section for the whole note",
                    advice: "Write the name alone."))
        }
        return ("\(sectionHead)\(section)\(sectionTail)\n\n", "")
    }

    /// The user's message that asks for a note, or for one section of it.
    ///
    /// - Throws: `Phi3Error.input` for a section name that `parts(section:)` refuses.
    public static func user(
        conversation: String, section: String? = nil
    ) throws(Phi3Error) -> String {
        let (before, after) = try parts(section: section)
        return before + conversation + after
    }

    /// The conversation and section that `user(conversation:section:)` was given; nil for any other
    /// text.
    public static func parse(_ text: String) -> (conversation: String, section: String?)? {
        let scalars = Array(text.unicodeScalars)
        let known = Array(whole.unicodeScalars)
        if scalars.starts(with: known) {
            return (String(scalars: scalars[known.count...]), nil)
        }
        guard let end = scalars.firstIndex(of: "\n"), end + 1 < scalars.count,
            scalars[end + 1] == "\n", scalars.starts(with: sectionHead.unicodeScalars)
        else { return nil }
        let line = scalars[..<end]
        let (head, tail) = (sectionHead.unicodeScalars.count, sectionTail.unicodeScalars.count)
        guard line.count > head + tail, line.suffix(tail).elementsEqual(sectionTail.unicodeScalars)
        else { return nil }
        return (
            String(scalars: scalars[(end + 2)...]),
            String(scalars: line.dropFirst(head).dropLast(tail))
        )
    }
}
