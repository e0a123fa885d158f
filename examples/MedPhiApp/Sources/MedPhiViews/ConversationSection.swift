#if canImport(SwiftUI)
    import MedPhiSession
    import SwiftUI
    import UniformTypeIdentifiers

    /// The conversation, typed, pasted or from a file.
    struct ConversationSection: View {
        @Bindable var session: NoteSession
        @State private var picksText = false

        var body: some View {
            Section("Conversation") {
                TextEditor(text: $session.text)
                    .font(.body.monospaced())
                    .frame(minHeight: 160)
                    .accessibilityLabel("The conversation, one line for each turn")
                Text(session.summary ?? "One line for each turn: “Doctor: …”, “Patient: …”")
                    .font(.footnote)
                    .foregroundStyle(.secondary)
                TextField("Section, as GENHX; empty for the whole note", text: $session.section)
                HStack {
                    Button("Open a text file…") { picksText = true }
                        .fileImporter(
                            isPresented: $picksText, allowedContentTypes: [.plainText]
                        ) { result in
                            switch result {
                            case .success(let url): session.openConversation(url)
                            case .failure(let error): session.fail(error)
                            }
                        }
                    Spacer()
                    if session.phase == .writing {
                        Button("Stop", role: .cancel) { session.stop() }
                    } else {
                        Button("Write the note") { Task { await session.write() } }
                            .buttonStyle(.borderedProminent)
                            .disabled(!session.canWrite)
                    }
                }
                // In a form on iOS, a tap on a row presses all of its plain buttons.
                .buttonStyle(.borderless)
            }
        }
    }
#endif
