package policy

import (
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"kedge/deployments"
)

// Bounds limit what releases may do. An agent's configuration sets them for its node, whatever KV says, and kedge.yaml
// sets them for the releases of a commit. The zero value allows everything but plain http:// of other machines.
type Bounds struct {
	// Sources are URLs, or prefixes of URLs by whole path segments, that a release may come from: its manifest, and what
	// that fetches. Empty: any, except plain http:// of other machines, which must be named.
	Sources []string
	// NoLocal refuses file://, http:// and https:// that lead to this machine or its link, unless Sources name them.
	// Without NoLocal, whoever may only pin could make the agent read files and send requests with its own rights.
	NoLocal bool
	// Dests are directories that a tree may go live at or below; empty: any.
	Dests []string
	// Users are the users, as manifests name them, that commands may run as and that may own the tree; empty: any.
	// A tree's group must belong to one of them. NoCommands forbids commands, and with them exec health checks.
	Users      []string
	NoCommands bool
}

// BoundsOf returns the bounds that kedge.yaml sets for a stage.
func BoundsOf(s deployments.Settings, stage string) Bounds {
	commands, set := deployments.OfStage(s.Commands, stage)
	b := Bounds{NoCommands: set && !commands}
	b.Sources, _ = deployments.OfStage(s.Sources, stage)
	b.Dests, _ = deployments.OfStage(s.Dests, stage)
	b.Users, _ = deployments.OfStage(s.Users, stage)
	return b
}

// NeedManifest reports whether a release's manifest has to be read, as nothing else shows if the
// release keeps to the bounds. It is false if the bounds limit at most sources. The pointer then
// shows where the manifest lies, though not what the manifest fetches.
func (b Bounds) NeedManifest() bool { return len(b.Dests) > 0 || len(b.Users) > 0 || b.NoCommands }

// CheckSource returns an error if the bounds forbid fetching from a URL.
func (b Bounds) CheckSource(source string) error {
	inSources := deployments.FromSource(source, b.Sources)
	if !inSources && deployments.IsPlainHTTP(source) {
		return fmt.Errorf(
			"%s is plain http of another machine, which anybody on the way can change: use https://, or name it in sources",
			deployments.ShownURL(source),
		)
	}
	if b.NoLocal && !inSources && isLocal(source) {
		return fmt.Errorf(
			"%s leads to this machine or to a link-local address: name it in sources, or set local_sources for the agent, "+
				"which allows all such URLs",
			deployments.ShownURL(source),
		)
	}
	if len(b.Sources) == 0 || inSources {
		return nil
	}
	return fmt.Errorf("%s is not from %s: to allow it, name it in sources", deployments.ShownURL(source),
		strings.Join(b.Sources, ", "))
}

// isLocal reports whether a URL's text leads to this machine or its link, or doesn't parse. http:// always does, as
// CheckSource has refused other machines. A name that resolves to this machine is only noticed when connecting.
func isLocal(text string) bool {
	u, err := url.Parse(text)
	return err != nil || u.Scheme == "file" || u.Scheme == "http" || u.Scheme == "https" && deployments.IsLocalURL(u)
}

// Check returns an error for the first thing that the release would do and the bounds forbid. names must return all
// names that a user has on the machine where the release would run, among them the number. Check calls it with "" for
// the user that the agent runs as. For ":GROUP", names must return the names and the number of the group, and those of
// b.Users that belong to it. A group other than root for which names returns nothing isn't checked here: only the nodes
// know the group.
func (b Bounds) Check(p deployments.Pointer, m *deployments.Manifest, names func(user string) []string) error {
	sources := []string{p.URL}
	if m.Src != "" {
		sources = append(sources, m.Src)
		if len(b.Dests) > 0 && !slices.ContainsFunc(b.Dests, func(dir string) bool { return below(m.Dest, dir) }) {
			return fmt.Errorf("dest %s is outside of %s", m.Dest, strings.Join(b.Dests, ", "))
		}
	}
	if m.Index != nil {
		sources = append(sources, m.Index.URL)
	}
	for _, d := range m.Deltas {
		sources = append(sources, d.URL)
	}
	for _, s := range sources {
		if err := b.CheckSource(s); err != nil {
			return err
		}
	}
	owner, group, _ := strings.Cut(m.Owner, ":")
	if owner != "" {
		if err := b.checkUser(owner, names); err != nil {
			return fmt.Errorf("owner: %w", err)
		}
	}
	if err := b.checkGroup(group, names); err != nil {
		return fmt.Errorf("owner: %w", err)
	}
	commands := slices.Concat(m.Commands.Pre, m.Commands.Post, m.Commands.Success, m.Commands.Failure)
	for _, c := range m.Health.Checks {
		if c.Exec != "" {
			commands = append(commands, deployments.Command{Run: c.Exec, User: c.User})
		}
	}
	for _, c := range commands {
		if b.NoCommands {
			return fmt.Errorf("the manifest has commands, and none are allowed: %q", c.Run)
		}
		if err := b.checkUser(c.User, names); err != nil {
			return fmt.Errorf("command %q: %w", c.Run, err)
		}
	}
	return nil
}

// checkUser returns an error if a user, given by name or number, is not allowed; "": the agent's own user.
func (b Bounds) checkUser(name string, names func(string) []string) error {
	if len(b.Users) == 0 || slices.ContainsFunc(names(name), func(n string) bool { return slices.Contains(b.Users, n) }) {
		return nil
	}
	if name == "" {
		return fmt.Errorf("it runs as the agent's own user, which is not among %s: set user", strings.Join(b.Users, ", "))
	}
	return fmt.Errorf("user %s is not among those allowed: %s", name, strings.Join(b.Users, ", "))
}

// checkGroup returns an error if a tree may not belong to a group, given by name or number. If the function names
// returns nothing for the group, only root is refused: see Check.
func (b Bounds) checkGroup(group string, names func(string) []string) error {
	if group == "" || len(b.Users) == 0 {
		return nil
	}
	known := names(":" + group)
	if len(known) == 0 && group != "root" && group != "0" {
		return nil
	}
	if slices.ContainsFunc(append(known, group), func(n string) bool { return slices.Contains(b.Users, n) }) {
		return nil
	}
	return fmt.Errorf("group %s is not among those allowed: %s", group, strings.Join(b.Users, ", "))
}

// below reports whether path is dir or lies below it.
func below(path, dir string) bool {
	rel, err := filepath.Rel(filepath.Clean(dir), path)
	return err == nil && filepath.IsLocal(rel)
}
