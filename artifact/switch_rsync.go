package artifact

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"kedge/artifact/archive"
	"kedge/artifact/safefs"
	"kedge/deployments"
	"kedge/deployments/durable"
)

// rsyncSwitcher implements StrategyRsync: rsync writes into dest itself.
type rsyncSwitcher struct{ treeSwitcher }

func (s rsyncSwitcher) Switch(ctx context.Context, r *Release) error {
	if _, err := s.excludeFrom(r); err != nil { // before a missing dest is made, as this error says that dest is untouched
		return err
	}
	parent, err := s.openParent(r)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("dest's parent directory %s does not exist: create it beforehand, or in a pre command",
			filepath.Dir(r.Manifest.Dest))
	}
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := removeAside(parent, r); err != nil {
		return err
	}
	if err := s.replaceLink(ctx, parent, r); err != nil {
		return fmt.Errorf("replacing the link at dest: %w", err)
	}
	dest, err := s.openDest(parent, r, true)
	if err != nil {
		return err
	}
	defer dest.Close()
	if s.c.Changes != "" {
		if err := s.changeRecord(r).remove(); err != nil { // rsync removes what the commands made
			return err
		}
	}
	return s.copy(ctx, r, dest)
}

// copy has rsync make dest equal to r's tree, and syncs dest's file system. Mounts and excluded
// files stay. exclude are further options of rsync that exclude files.
func (s rsyncSwitcher) copy(ctx context.Context, r *Release, dest *safefs.Place, exclude ...string) error {
	args, err := s.args(r, dest)
	if err != nil {
		return err
	}
	verbose := s.c.RsyncVerbose
	if verbose == nil {
		verbose = []string{"-v"}
	}
	args = append(slices.Concat(exclude, args, verbose), s.tree(r)+"/", dest.PathForTool("")+"/")
	if err := s.tool(ctx, "rsync", args...); err != nil {
		return err
	}
	return durable.SyncFS(dest.Path(""))
}

// replaceLink replaces the link that the release strategy left at dest, if any, by a whole tree. It
// exchanges them in one step, as the link's release is live.
func (s rsyncSwitcher) replaceLink(ctx context.Context, parent *safefs.Place, r *Release) error {
	if !s.hasReleaseLink(parent, r) {
		return nil
	}
	part := besideName(r) + ".part"
	private, err := parent.MakePrivate(part)
	if err != nil {
		return err
	}
	defer private.Close()
	tree, err := private.OpenPrivate("tree", true)
	if err != nil {
		return err
	}
	defer tree.Close()
	args, err := s.args(r, tree)
	if err != nil {
		return err
	}
	if err := s.tool(ctx, "rsync", append(args, s.tree(r)+"/", tree.PathForTool("")+"/")...); err != nil {
		return errors.Join(err, safefs.RemoveTree(parent.Path(part)))
	}
	if err := durable.SyncFS(tree.Path("")); err != nil {
		return err
	}
	dest := parent.Path(filepath.Base(r.Manifest.Dest))
	if err := unix.Renameat2(unix.AT_FDCWD, private.Path("tree"), unix.AT_FDCWD, dest, unix.RENAME_EXCHANGE); err != nil {
		return err
	}
	return errors.Join(durable.SyncDir(parent.Path("")), safefs.RemoveTree(parent.Path(part)))
}

// errNoDirectory means that strategy rsync can't write to dest. What lies there stays, as kedge
// didn't put it there.
var errNoDirectory = errors.New("neither a directory nor a link to one")

// openDest opens r's dest in parent; create makes a missing one. A link is followed if only trusted
// users can have made it. The error wraps ErrUntouched and errNoDirectory if something else than a
// directory lies there.
func (s rsyncSwitcher) openDest(parent *safefs.Place, r *Release, create bool) (*safefs.Place, error) {
	dest, err := parent.OpenDest(r.Manifest.Dest, s.c.Within, create)
	if errors.Is(err, unix.ENOTDIR) {
		return nil, fmt.Errorf("%w: %s is %w, which sync_strategy rsync needs: move it away (%w)",
			ErrUntouched, r.Manifest.Dest, errNoDirectory, err)
	}
	return dest, err
}

func (s rsyncSwitcher) args(r *Release, dest *safefs.Place) ([]string, error) {
	// By content, as archives with normalised times, like kedge publish's, look unchanged by size and time.
	args := []string{"-a", "--delete", "--checksum"}
	from, err := s.excludeFrom(r)
	if err != nil {
		return nil, err
	}
	if from != "" {
		args = append(args, "--exclude-from", from)
	}
	for _, e := range r.Manifest.Excludes {
		args = append(args, "--exclude", e)
	}
	mounts, err := safefs.MountsBelow(dest.Path(""))
	if err != nil {
		return nil, fmt.Errorf("looking for mounts in dest: %w", err)
	}
	for _, m := range mounts {
		if m != "." {
			// Neither a mounted file nor what lies in a mounted directory is deleted.
			args = append(args, "--filter", "P "+rsyncPattern(m, ""), "--filter", "P "+rsyncPattern(m, "/**"))
		}
	}
	return args, nil
}

// excludeMounts returns options by which rsync neither reads, compares nor deletes the mounts below
// dest.
func excludeMounts(dest *safefs.Place) (args []string, err error) {
	mounts, err := safefs.MountsBelow(dest.Path(""))
	if err != nil {
		return nil, fmt.Errorf("looking for mounts in dest: %w", err)
	}
	for _, m := range mounts {
		if m != "." {
			args = append(args, "--exclude", rsyncPattern(m, ""))
		}
	}
	return args, nil
}

// excludeFrom returns the path of the manifest's exclude_from in r's tree; empty: it names none. If the file is
// missing, the error wraps ErrUntouched.
func (s rsyncSwitcher) excludeFrom(r *Release) (string, error) {
	from := r.Manifest.ExcludeFrom
	if from == "" {
		return "", nil
	}
	file := filepath.Join(s.tree(r), from)
	// For a missing file, rsync's exit status is that of a failing disk, and the deployment would be retried for ever.
	if !safefs.Exists(file) {
		return "", fmt.Errorf("%w: exclude_from: the archive has no file %s", ErrUntouched, from)
	}
	return file, nil
}

// rsyncPattern returns an rsync pattern that matches the path p of the tree, followed by the
// pattern suffix. Each line break in p becomes a ?, which matches any character, as a line break
// would end the pattern in a file.
func rsyncPattern(p, suffix string) string {
	pattern := "/" + rsyncEnds.Replace(p) + suffix
	if !strings.ContainsAny(pattern, "*?[") {
		return pattern // without wildcards, rsync takes a backslash literally
	}
	return "/" + rsyncLiteral.Replace(p) + suffix
}

var (
	rsyncEnds    = strings.NewReplacer("\n", "?", "\r", "?")
	rsyncLiteral = strings.NewReplacer("*", `\*`, "?", `\?`, "[", `\[`, `\`, `\\`, "\n", "?", "\r", "?")
)

func (s rsyncSwitcher) SwitchBack(ctx context.Context, r, _ *Release, _ bool) error {
	if safefs.Exists(s.tree(r)) {
		if ds, err := s.Verify(ctx, r, 0); err == nil && len(ds) == 0 {
			return nil // dest may be read-only by now
		}
	}
	if err := s.Stage(ctx, r, StageOptions{}); err != nil {
		return fmt.Errorf("unpacking again the release to go back to: %w", err)
	}
	return s.Switch(ctx, r)
}

// Verify asks rsync what it would change, and leaves out mounts and what r's commands made. It
// returns nothing if r's unpacked tree is gone. rsync can't bound its reading speed, so limit is
// ignored.
func (s rsyncSwitcher) Verify(ctx context.Context, r *Release, _ int64) ([]Difference, error) {
	if !safefs.Exists(s.tree(r)) {
		return nil, nil
	}
	dest, err := s.open(r, false)
	if errors.Is(err, fs.ErrNotExist) {
		return []Difference{{Path: ".", What: "missing"}}, nil
	}
	if errors.Is(err, errNoDirectory) {
		return []Difference{{Path: ".", What: "type"}}, nil
	}
	if err != nil {
		return nil, err
	}
	defer dest.Close()
	made := readChanges(s.changeRecord(r).made)
	items := &itemized{skip: wholePaths(made)}
	if err := s.itemize(ctx, r, dest, items, false); err != nil {
		return nil, err
	}
	mounts, err := safefs.MountsBelow(dest.Path(""))
	if err != nil {
		return nil, fmt.Errorf("looking for mounts in dest: %w", err)
	}
	return withoutChangesAt(dest.Path(""), made, items.all(), mounts)
}

// open is openDest for callers that haven't opened dest's parent directory, which must exist.
func (s rsyncSwitcher) open(r *Release, create bool) (*safefs.Place, error) {
	parent, err := s.openParent(r)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	return s.openDest(parent, r, create)
}

func (s rsyncSwitcher) changeRecord(r *Release) changeRecord {
	name := filepath.Join(s.c.Changes, r.Pointer.Digest.String())
	return changeRecord{name + changesSuffix, name + beforeSuffix}
}

// RecordAfter records what the release's commands changed in dest. rsync compares dest with the
// unpacked tree by size and time. Files of the same size and another time are then compared by
// content. If dest or the unpacked tree is gone, or Changes isn't configured, nothing is recorded.
func (s rsyncSwitcher) RecordAfter(ctx context.Context, r *Release) error {
	if s.c.Changes == "" || !safefs.Exists(s.tree(r)) {
		return nil
	}
	dest, err := s.open(r, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dest.Close()
	items := &itemized{}
	if err := s.itemize(ctx, r, dest, items, true); err != nil {
		return fmt.Errorf("recording what the commands of %s made: %w", deployments.ShownURL(r.Pointer.URL), err)
	}
	found, err := s.withUnread(ctx, r, dest, items)
	if err != nil {
		return fmt.Errorf("recording what the commands of %s made: %w", deployments.ShownURL(r.Pointer.URL), err)
	}
	if err := os.MkdirAll(s.c.Changes, 0o700); err != nil {
		return err
	}
	left, err := s.changeRecord(r).recordAfter(dest.Path(""), found)
	if left += items.more; err == nil && left > 0 && s.c.Log != nil {
		s.c.Log.Warn("the release's commands made more paths than kedge records: the others count as drift",
			"dest", r.Manifest.Dest, "recorded", maxChanges, "left_out", left)
	}
	return err
}

// itemize adds to items what rsync would change in dest, except in mounts. If quick is set, rsync
// compares files by size and time, and if not, by content.
func (s rsyncSwitcher) itemize(ctx context.Context, r *Release, dest *safefs.Place, items *itemized, quick bool) error {
	args, err := s.args(r, dest)
	if err != nil {
		return err
	}
	mounts, err := excludeMounts(dest)
	if err != nil {
		return err
	}
	args = append(mounts, args...) // rsync goes by the first pattern that matches
	if quick {
		args = slices.DeleteFunc(args, func(a string) bool { return a == "--checksum" })
		args = append(args, "--modify-window=-1") // nanoseconds: commands may run in the second of the unpacking
	}
	args = append(args, "--dry-run", "--out-format=%i/%n", s.tree(r)+"/", dest.PathForTool("")+"/")
	_, err = s.c.Tool(ctx, items, "rsync", args...)
	return err
}

// withUnread returns the differences in items, and those unread files that differ from r's tree in
// content, mode or owner.
func (s rsyncSwitcher) withUnread(ctx context.Context, r *Release, dest *safefs.Place, items *itemized) ([]Difference,
	error) {
	tree, err := os.OpenRoot(s.tree(r))
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	live, err := os.OpenRoot(dest.Path(""))
	if err != nil {
		return nil, err
	}
	defer live.Close()
	found := items.all()
	for _, d := range items.unread {
		same, err := sameContent(ctx, tree, live, d.Path)
		if err != nil {
			return nil, err
		}
		if !same {
			d.What = "content"
		}
		if d.What != "" {
			found = append(found, d)
		}
	}
	return found, nil
}

// Heal makes dest equal to r's tree, except what r's commands made, which it restores as far as it can. left are the
// remaining differences.
func (s rsyncSwitcher) Heal(ctx context.Context, r *Release) (left []Difference, err error) {
	made := readChanges(s.changeRecord(r).made)
	if len(made) == 0 {
		return nil, s.SwitchBack(ctx, r, nil, false)
	}
	if safefs.Exists(s.tree(r)) {
		left, err := s.Verify(ctx, r, 0)
		if gone := unrestorable(made, left); err == nil &&
			!slices.ContainsFunc(left, func(d Difference) bool { return !gone[d.Path] }) {
			return left, nil
		}
	}
	if err := s.Stage(ctx, r, StageOptions{}); err != nil {
		return nil, fmt.Errorf("unpacking again the release to heal: %w", err)
	}
	dest, err := s.open(r, true)
	if err != nil {
		return nil, err
	}
	defer dest.Close()
	exclude, err := s.excludeChanges(r, dest, made)
	if err != nil {
		return nil, err
	}
	if err := s.copy(ctx, r, dest, "--exclude-from", exclude); err != nil {
		return nil, errors.Join(err, os.Remove(exclude))
	}
	if err := os.Remove(exclude); err != nil {
		return nil, err
	}
	if err := restoreChanges(dest.Path(""), dest.Path(""), made); err != nil {
		return nil, err
	}
	if err := durable.SyncFS(dest.Path("")); err != nil {
		return nil, err
	}
	return s.Verify(ctx, r, 0)
}

// excludeChanges writes a file of rsync patterns for the paths in made, and returns the file's
// path. The caller must remove the file. It lacks paths that rsync is to correct: those of which
// only the mode or owner is restored afterwards, and files whose changed content is lost.
func (s rsyncSwitcher) excludeChanges(r *Release, dest *safefs.Place, made []commandChange) (file string, err error) {
	live, err := openRestorer(dest.Path(""), dest.Path(""))
	if err != nil {
		return "", err
	}
	defer live.close()
	var patterns strings.Builder
	for i := range made {
		m := &made[i]
		if !m.whole() && m.Type != typeLink && (m.Sum == nil || !m.ContentKept && !live.asLeft(m)) {
			continue // rsync corrects it first
		}
		patterns.WriteString(rsyncPattern(m.Path, "") + "\n")
	}
	file = filepath.Join(s.c.Changes, r.Pointer.Digest.String()+".exclude")
	return file, os.WriteFile(file, []byte(patterns.String()), 0o600)
}

// itemized parses rsync's output with --out-format=%i/%n as it is written, since that output has no bound.
type itemized struct {
	// skip are paths that are left out, with what lies below them.
	skip pathSet
	line []byte // not ended yet
	// found are differences at paths of the archive.
	found []Difference
	// unread are files of the same size as in the archive and with another time, whose content
	// rsync hasn't compared. Their field What is "mode" or "owner" if these differ, else empty.
	unread []Difference
	// extra are the first maxExtra paths that aren't in the archive, of which an application can make any number; more
	// counts the others. Nothing in extra lies below another path in it.
	extra []Difference
	more  int
}

func (i *itemized) Write(p []byte) (int, error) {
	for rest := p; ; {
		part, more, ended := bytes.Cut(rest, []byte("\n"))
		i.line = append(i.line, part...)
		if !ended {
			return len(p), nil
		}
		i.add(parseItem(string(i.line)))
		i.line, rest = i.line[:0], more
	}
}

func (i *itemized) add(it item) {
	switch {
	case i.skip.covers(it.Path):
	case it.unread:
		i.unread = append(i.unread, it.Difference)
	case it.What == "extra":
		i.addExtra(it)
	case it.What != "":
		i.found = append(i.found, it.Difference)
	}
}

// addExtra adds it to extra. If it is a directory, it takes the place of the paths below it: rsync
// prints these right before the directory.
func (i *itemized) addExtra(it item) {
	below := len(i.extra)
	for it.dir && below > 0 && strings.HasPrefix(i.extra[below-1].Path, it.Path+"/") {
		below--
	}
	if below < len(i.extra) { // the paths that more counts came after these, and thus lie in the directory, too
		i.extra, i.more = i.extra[:below], 0
	}
	if len(i.extra) >= maxExtra {
		i.more++
		return
	}
	i.extra = append(i.extra, it.Difference)
}

// all returns found and extra, sorted by path.
func (i *itemized) all() []Difference {
	all := slices.Concat(i.found, i.extra)
	slices.SortStableFunc(all, func(a, b Difference) int { return archive.ComparePaths(a.Path, b.Path) })
	return all
}

// item is what a line of rsync's output says.
type item struct {
	Difference // What is empty if the line is about no difference
	dir        bool
	unread     bool // see itemized
}

var (
	// itemLine matches YXcstpoguax/PATH and *deleting/PATH. A directory's PATH ends in a slash.
	itemLine = regexp.MustCompile(`^(\*deleting|[<>ch.][fdLDS][-.+?a-zA-Z ]{9,}) */(.*?)(/?)$`)
	// itemEscape matches what stands for a byte that doesn't print in the C locale.
	itemEscape = regexp.MustCompile(`\\#[0-7]{3}`)
)

// parseItem parses a line of rsync's output with --out-format=%i/%n. It returns an empty item for any other line.
func parseItem(line string) (it item) {
	m := itemLine.FindStringSubmatch(line)
	if m == nil {
		return item{}
	}
	flags := m[1]
	it.dir = m[3] != ""
	it.Path = itemEscape.ReplaceAllStringFunc(m[2], func(s string) string {
		b, err := strconv.ParseUint(s[2:], 8, 8)
		if err != nil {
			return s
		}
		return string([]byte{byte(b)})
	})
	switch {
	case flags == "*deleting":
		it.What = "extra"
	case strings.Trim(flags[2:], "+") == "":
		it.What = "missing"
	case flags[1] == 'L' && flags[2] == 'c':
		it.What = "link"
	case strings.ContainsAny(flags[2:4], "cs"):
		it.What = "content"
	case flags[5] == 'p':
		it.What = "mode"
	case flags[6] == 'o' || flags[7] == 'g':
		it.What = "owner"
	}
	// Without --checksum, if a command has written or touched a file and left its size, rsync shows only the new time.
	it.unread = flags[0] == '>' && (it.What == "" || it.What == "mode" || it.What == "owner")
	return it
}
