package deployments

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/goccy/go-yaml/ast"
)

// Tree is a whole, valid commit of a deployments repo.
type Tree struct {
	Settings Settings
	// Units are sorted by stage, role and unit.
	Units []Unit
	// Submodules are the directories at STAGE that are submodules, whose files are not read.
	Submodules []string
}

// Warnings returns a message for each submodule at STAGE, and for each role that has more than
// MaxRoleUnits units. These units are valid, but a node leaves out those beyond that number.
func (t *Tree) Warnings() (words []string) {
	for _, stage := range t.Submodules {
		words = append(words, fmt.Sprintf("%s is a submodule, whose files are not read: units of a stage %[1]s have to "+
			"lie in the repo itself", stage))
	}
	units := map[RoleID]int{}
	for _, u := range t.Units {
		units[u.ID.RoleID()]++
	}
	for _, role := range slices.SortedFunc(maps.Keys(units), RoleID.Compare) {
		if n := units[role]; n > MaxRoleUnits {
			words = append(words, fmt.Sprintf("%s has %d units: a node runs at most %d of one role, and leaves out the "+
				"rest: divide them among several roles", role, n, MaxRoleUnits))
		}
	}
	return words
}

// Problem is one mistake in a commit or a manifest, at a place that an editor can jump to.
type Problem struct {
	File string `json:"file"`
	// Line and Column count from 1; 0 is the whole file.
	Line    int    `json:"line,omitzero"`
	Column  int    `json:"column,omitzero"`
	Message string `json:"message"`
}

func (p Problem) Error() string {
	if p.Line == 0 {
		return fmt.Sprintf("%s: %s", p.File, p.Message)
	}
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
}

// Problems are the mistakes that were found in a commit or a manifest, in order of file and line.
type Problems []Problem

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

const (
	// SettingsFile is the name of the settings file, at the top of a deployments repo.
	SettingsFile = "kedge.yaml"
	// MaxUnitFile bounds a unit's file and kedge.yaml, in bytes; MaxUnits the units of a commit.
	MaxUnitFile = 64 << 10
	MaxUnits    = 20_000
	// maxAfter bounds the names in after. Every record of the unit contains them, and no node takes a record
	// larger than MaxRecord.
	maxAfter = 100
	// MaxFiles bounds the files and directories of a commit, and maxNested their depth. A few Git objects that
	// name each other in many places could expand without end.
	MaxFiles  = 200_000
	maxNested = 50
	// maxTreeProblems is the number of problems at which reading ends, as finding one can take half a second.
	maxTreeProblems = 1000
)

// Load reads a commit's tree: kedge.yaml (all defaults if it is missing), and every
// STAGE/ROLE/UNIT.yaml or .yml. It ignores dot-files, and files with another ending. A .yaml or
// .yml file in a wrong place is a problem. So are a directory in place of a unit's file, a symbolic
// link that hides units, and a submodule at STAGE/ROLE. The error is a Problems value that lists
// the mistakes found, each with its place, or it is an error of reading the tree.
func Load(fsys fs.FS) (*Tree, error) {
	l := &loader{
		fsys:   fsys,
		tree:   &Tree{Settings: Settings{MaxRemoved: defaultMaxRemoved, Drift: DriftReport}},
		places: map[UnitID]string{},
	}
	err := fs.WalkDir(fsys, ".", l.visit)
	if problems := Problems(nil); errors.As(err, &problems) {
		return nil, problems
	}
	if err != nil {
		return nil, fmt.Errorf("reading the deployments repo: %w", err)
	}
	if len(l.files) > MaxUnits {
		return nil, Problems{{File: ".", Message: fmt.Sprintf("%d units, at most %d are allowed", len(l.files), MaxUnits)}}
	}
	if err := l.readSettings(); err != nil {
		return nil, err
	}
	for _, file := range l.files {
		if l.tooManyProblems() {
			break
		}
		if err := l.readUnit(file); err != nil {
			return nil, err
		}
	}
	if !l.tooManyProblems() {
		l.checkAfter()
	}
	if len(l.problems) > 0 {
		slices.SortStableFunc(l.problems, func(a, b Problem) int {
			return cmp.Or(strings.Compare(a.File, b.File), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
		})
		return nil, l.problems
	}
	slices.SortFunc(l.tree.Units, func(a, b Unit) int { return a.ID.Compare(b.ID) })
	return l.tree, nil
}

type loader struct {
	fsys     fs.FS
	seen     int // files and directories
	tree     *Tree
	settings bool     // kedge.yaml is there
	files    []string // of units
	places   map[UnitID]string
	afters   []afterPlace
	problems Problems
}

// afterPlace is a place in a unit file where after names another unit.
type afterPlace struct {
	file     string
	line     int
	column   int
	unit, on UnitID
}

// tooManyProblems reports whether so many problems were found that reading can end.
func (l *loader) tooManyProblems() bool { return len(l.problems) >= maxTreeProblems }

func (l *loader) visit(name string, d fs.DirEntry, err error) error {
	l.seen++
	switch {
	case err != nil:
		return err
	case l.seen > MaxFiles:
		return Problems{
			{File: ".", Message: fmt.Sprintf("more than %d files and directories: keep other files elsewhere", MaxFiles)},
		}
	case strings.Count(name, "/") >= maxNested:
		return Problems{
			{File: name, Message: fmt.Sprintf("it lies deeper than %d directories: keep other files elsewhere", maxNested)},
		}
	case l.tooManyProblems():
		return fs.SkipAll
	case name == ".":
		return nil
	case d.Name() == ".git" && strings.Count(name, "/") == 2:
		l.problems = append(
			l.problems,
			Problem{
				File:    path.Dir(name),
				Message: "it is a submodule, which is not mirrored: keep the unit files in the repo itself",
			},
		)
		return fs.SkipDir
	case d.Name() == ".git" && name != ".git": // a submodule, whose content a mirror doesn't see
		stage := path.Dir(name)
		if strings.Count(name, "/") == 1 && CheckSegment("stage", stage) == nil {
			l.tree.Submodules = append(l.tree.Submodules, stage)
		}
		return fs.SkipDir
	case strings.HasPrefix(d.Name(), "."):
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	case d.Type() == fs.ModeSymlink && !isYAML(name) && l.hidesUnits(name):
		l.problems = append(l.problems, Problem{
			File:    name,
			Message: "it is a symbolic link to a directory with units, which are not read there: link the units' files, or move the directory",
		})
		return nil
	case d.IsDir() && name == SettingsFile:
		l.problems = append(l.problems, Problem{File: name, Message: "it is a directory: want a file of settings"})
		return fs.SkipDir
	case d.IsDir() && isYAML(name) && strings.Count(name, "/") == 2:
		l.problems = append(l.problems, Problem{File: name, Message: "it is a directory: want a unit's file"})
		return fs.SkipDir
	case d.IsDir():
		return nil
	case name == SettingsFile:
		l.settings = true
		return nil
	}
	if !isYAML(name) {
		return nil
	}
	if strings.Count(name, "/") != 2 {
		l.problems = append(
			l.problems,
			Problem{File: name, Message: "a unit's file lies at STAGE/ROLE/UNIT.yaml, and settings in kedge.yaml at the top"},
		)
		return nil
	}
	l.files = append(l.files, name)
	return nil
}

// isYAML reports whether a file's name ends as a unit's has to.
func isYAML(name string) bool { return path.Ext(name) == ".yaml" || path.Ext(name) == ".yml" }

// hidesUnits reports whether a symbolic link leads to a directory in which kedge would look for units if the link
// were a directory.
func (l *loader) hidesUnits(name string) (found bool) {
	_ = fs.WalkDir(l.fsys, name, func(below string, d fs.DirEntry, err error) error {
		l.seen++
		switch {
		case err != nil || l.seen > MaxFiles:
			return fs.SkipAll
		case strings.Count(below, "/") == 2:
			found = found || isYAML(below)
			if d.IsDir() {
				return fs.SkipDir
			}
		}
		return nil
	})
	return found
}

// read returns a file's bytes. If the file is too large or not a regular one, read notes a problem, and returns nil
// without an error.
func (l *loader) read(name string) ([]byte, error) {
	info, err := fs.Stat(l.fsys, name)
	if err != nil {
		return nil, fmt.Errorf("reading the deployments repo: %w", err)
	}
	switch {
	case info.IsDir():
		l.problems = append(l.problems, Problem{File: name, Message: "it is a directory: want a file"})
		return nil, nil
	case !info.Mode().IsRegular():
		l.problems = append(l.problems, Problem{File: name, Message: "it is a pipe, a device or the like: want a file"})
		return nil, nil
	}
	if info.Size() > MaxUnitFile {
		l.problems = append(
			l.problems,
			Problem{File: name, Message: fmt.Sprintf("the file has %d bytes, at most %d are allowed", info.Size(), MaxUnitFile)},
		)
		return nil, nil
	}
	data, err := fs.ReadFile(l.fsys, name)
	if err != nil {
		return nil, fmt.Errorf("reading the deployments repo: %w", err)
	}
	if data == nil {
		data = []byte{}
	}
	return data, nil
}

func (l *loader) readSettings() error {
	if !l.settings {
		return nil
	}
	data, err := l.read(SettingsFile)
	if err != nil || data == nil {
		return err
	}
	r := &reader{file: SettingsFile}
	if root := r.parse(data, MaxUnitFile); root != nil {
		r.settings(root, &l.tree.Settings)
	}
	l.problems = append(l.problems, r.problems...)
	return nil
}

func (l *loader) readUnit(name string) error {
	parts := strings.Split(strings.TrimSuffix(name, path.Ext(name)), "/")
	id := UnitID{parts[0], parts[1], parts[2]}
	if err := id.Check(); err != nil {
		l.problems = append(l.problems, Problem{File: name, Message: err.Error()})
		return nil
	}
	if other, ok := l.places[id]; ok {
		l.problems = append(l.problems,
			Problem{File: name, Message: fmt.Sprintf("unit %s stands in %s as well: remove one of them", id, other)})
		return nil
	}
	l.places[id] = name
	data, err := l.read(name)
	if err != nil || data == nil {
		return err
	}
	r := &reader{file: name}
	root := r.parse(data, MaxUnitFile)
	if root == nil {
		if len(r.problems) == 0 {
			r.note(0, 0, "the file is empty: want release: POINTER; to stop deploying the unit, remove the file")
		}
		l.problems = append(l.problems, r.problems...)
		return nil
	}
	settings := l.tree.Settings
	u := Unit{ID: id, Drift: settings.Drift}
	if settings.Rollout != nil {
		copied := *settings.Rollout
		u.Rollout = &copied
	}
	seen := r.fields(root, "a unit", map[string]func(ast.Node){
		"release": func(n ast.Node) {
			into(r, &u.Release, ParsePointer)(n)
			u.Place.File = name
			u.Place.Line, u.Place.Column = position(n)
			if !u.Release.IsZero() && !settings.allows(id.Stage, u.Release.URL) {
				r.noteAt(n, "%s is not among the sources that %s allows for stage %s", ShownURL(u.Release.URL), SettingsFile,
					id.Stage)
			}
		},
		"after": func(n ast.Node) {
			r.each(n, func(item ast.Node) {
				name, ok := r.text(item)
				if ok && name == "" {
					r.noteAt(item, "after: want the name of a unit of this role")
				}
				if name == "" {
					return
				}
				at := item.GetToken().Position
				l.afters = append(l.afters, afterPlace{r.file, at.Line, at.Column, id, UnitID{id.Stage, id.Role, name}})
				u.After = append(u.After, name)
			})
			if len(u.After) > maxAfter {
				r.noteAt(n, "after has %d names, at most %d are allowed", len(u.After), maxAfter)
			}
		},
		"rollout": func(n ast.Node) {
			if u.Rollout == nil {
				u.Rollout = newRollout()
			}
			r.rollout(n, u.Rollout)
		},
		"drift": into(r, &u.Drift, asOneOf(DriftReport, DriftHeal)),
		"adopt": into(r, &u.Adopt, asBool),
	})
	if seen["release"] == nil {
		r.noteAt(root, "release is missing: want release: POINTER, as kedge publish prints it")
	}
	l.problems = append(l.problems, r.problems...)
	l.tree.Units = append(l.tree.Units, u)
	return nil
}

// checkAfter notes two kinds of problems in the units' field after: names that are no unit of the role, and cycles.
func (l *loader) checkAfter() {
	on := map[UnitID][]afterPlace{}
	for _, a := range l.afters {
		note := func(format string, args ...any) {
			l.problems = append(l.problems, Problem{a.file, a.line, a.column, fmt.Sprintf(format, args...)})
		}
		switch {
		case a.on == a.unit:
			note("unit %s comes after itself: a cycle", a.unit.Unit)
		case l.places[a.on] == "":
			note("after names %q, which is no unit of %s/%s", clip(a.on.Unit), a.unit.Stage, a.unit.Role)
		default:
			on[a.unit] = append(on[a.unit], a)
		}
	}
	const visiting, done = 1, 2
	state := map[UnitID]int{}
	var trail []UnitID
	var follow func(UnitID)
	follow = func(id UnitID) {
		state[id] = visiting
		trail = append(trail, id)
		for _, a := range on[id] {
			switch state[a.on] {
			case visiting:
				names := []string{}
				for _, t := range trail[slices.Index(trail, a.on):] {
					names = append(names, t.Unit)
				}
				l.problems = append(l.problems, Problem{a.file, a.line, a.column,
					fmt.Sprintf("after makes a cycle: %s after %s", strings.Join(names, " after "), a.on.Unit)})
			case done:
			default:
				follow(a.on)
			}
		}
		trail = trail[:len(trail)-1]
		state[id] = done
	}
	ids := make([]UnitID, 0, len(on))
	for id := range on {
		ids = append(ids, id)
	}
	slices.SortFunc(ids, UnitID.Compare)
	for _, id := range ids {
		if state[id] == 0 {
			follow(id)
		}
	}
}
