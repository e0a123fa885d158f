#if canImport(SwiftUI)
    import MedPhiSession
    import SwiftUI

    /// The whole screen: model, conversation, note.
    public struct NoteScreen: View {
        @Bindable private var session: NoteSession

        /// Shows a session.
        public init(session: NoteSession) { self.session = session }

        public var body: some View {
            VStack(spacing: 0) {
                Form {
                    ModelSection(session: session)
                    ConversationSection(session: session)
                    NoteSectionView(session: session)
                }
                .formStyle(.grouped)
                // Never scrolls away.
                Text(Wording.notADevice)
                    .font(.footnote)
                    .foregroundStyle(.secondary)
                    .padding()
            }
            .alert("That did not work", isPresented: hasProblem) {
                Button("OK") { session.dismissProblem() }
            } message: {
                Text(session.problem ?? "")
            }
        }

        private var hasProblem: Binding<Bool> {
            Binding(
                get: { session.problem != nil },
                set: { if !$0 { session.dismissProblem() } })
        }
    }
#endif
