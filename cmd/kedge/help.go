package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"kedge/sync/fleet"
)

// usage writes a command's usage: its line, its subcommands by group, and its flags. The usage of kedge itself lists
// the topics, too.
func usage(w io.Writer, cmd *cobra.Command, width int) error {
	var b strings.Builder
	b.WriteString("Usage:\n")
	if cmd.HasParent() || !cmd.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "  %s\n", cmd.UseLine())
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "  %s COMMAND [flags]\n", cmd.CommandPath())
	}
	for _, group := range append(cmd.Groups(), &cobra.Group{Title: "Besides"}) {
		title := "\n" + group.Title + "\n"
		for _, c := range cmd.Commands() {
			if c.GroupID == group.ID && c.IsAvailableCommand() {
				fmt.Fprintf(&b, "%s  %-*s  %s\n", title, c.NamePadding(), c.Name(), c.Short)
				title = ""
			}
		}
	}
	flags := func(title string, f *pflag.FlagSet) {
		if f.HasAvailableFlags() {
			fmt.Fprintf(&b, "\n%s\n%s", title, f.FlagUsagesWrapped(width))
		}
	}
	flags("Flags:", cmd.LocalFlags())
	flags("Global flags:", cmd.InheritedFlags())
	if !cmd.HasParent() {
		b.WriteString(helpTopics())
	}
	if cmd.HasAvailableSubCommands() {
		fmt.Fprintf(&b, "\n%s COMMAND --help is the manual of each.\n", cmd.CommandPath())
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// reflow wraps the paragraphs of a text to a width; indented lines stay as they are.
func reflow(text string, width int) string {
	var lines []string
	open := false // the last line may be continued
	for line := range strings.SplitSeq(text, "\n") {
		verbatim := line == "" || strings.HasPrefix(line, " ")
		if open && !verbatim {
			lines[len(lines)-1] += " " + line
			continue
		}
		lines, open = append(lines, line), !verbatim
	}
	for i, line := range lines {
		if line != "" && !strings.HasPrefix(line, " ") {
			lines[i] = strings.ReplaceAll(fleet.Wrap(line, width), "\n  ", "\n")
		}
	}
	return strings.Join(lines, "\n")
}
