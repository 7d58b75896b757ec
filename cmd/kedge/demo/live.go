package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"kedge/sync/fleet"
)

// Live starts the fleet on the first of three releases, and shows it until the demo's context ends
// or q is typed. Neither is an error.
func (d *Demo) Live() error {
	fmt.Fprintf(d.Out, "kedge demo: publishing three releases, starting a mirror and three agents in %s …\n", d.dir)
	for _, version := range []string{firstVersion, secondVersion, brokenVersion} {
		if _, err := d.publish(version); err != nil {
			return err
		}
	}
	if err := d.push(firstVersion); err != nil {
		return err
	}
	if err := d.startMirror(); err != nil {
		return err
	}
	for _, node := range []string{"web-1", "web-2", "web-3"} {
		if err := d.startNode(node); err != nil {
			return err
		}
	}
	if err := d.serveWeb(); err != nil {
		return err
	}
	var err error
	if restore, ok := d.readKeysRaw(); ok {
		defer restore()
		go d.readKeys(d.In) // without input it ends with the process
		err = d.Screen(d.ctx, d.store, func(w io.Writer, f *fleet.Fleet, width int) {
			d.draw(w, f, fleet.TableOptions{Width: width, Color: d.Color, AllNodes: true})
		})
	} else {
		fmt.Fprintf(d.Out, "\nIn a browser: http://%s/\n%s", d.web.Addr(), d.advice())
		err = fleet.Watch(d.ctx, d.store, fleet.Filter{}, d.printChanges)
	}
	if errors.Is(err, context.Canceled) {
		fmt.Fprintln(d.Out, "\nending the agents and the mirror …")
		return nil
	}
	return err
}

// printChanges prints a line for each node that changed since the last call. Live uses it if no keys can be typed.
func (d *Demo) printChanges(f *fleet.Fleet) {
	for _, u := range f.Units {
		for _, n := range u.Nodes {
			line := strings.TrimSpace(
				fmt.Sprintf("%s  %s  %s %s  %s", u.ID, n.Name, n.Report.State, n.Report.Version, n.Report.Error),
			)
			if d.shown[n.Name] != line {
				d.shown[n.Name] = line
				fmt.Fprintf(d.Out, "%s  %s\n", time.Now().Format("15:04:05.000"), line)
			}
		}
	}
}

// advice returns commands for a second terminal, ready to copy.
func (d *Demo) advice() string {
	return fmt.Sprintf(`
In another terminal:

  . %s
  # deploy %[2]s: change one line and push
  sed -i "s|^release:.*|release: $(cat ../%[2]s)|" prod/web/app.yaml; git commit -qam %[2]s; git push -q

  # deploy %[3]s, whose health check fails: every node goes back by itself
  sed -i "s|^release:.*|release: $(cat ../%[3]s)|" prod/web/app.yaml; git commit -qam %[3]s; git push -q

  # pin %[4]s in a hurry; then see why, and unpin
  kedge pin prod/web/app %[4]s --reason demo
  kedge explain web-1/app
  kedge unpin prod/web/app

Ctrl-C ends the demo.
`, filepath.Join(d.dir, "env"), secondVersion, brokenVersion, firstVersion)
}
