package workload

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	// busTimeout is how long the manager may take for one question.
	busTimeout = 2 * time.Second

	service   = "org.freedesktop.systemd1"
	managerAt = dbus.ObjectPath("/org/freedesktop/systemd1")
	// noSuchUnit is the manager's word for a unit it has not loaded.
	noSuchUnit = "org.freedesktop.systemd1.NoSuchUnit"
)

// errNoUnit says that the manager does not know a unit.
var errNoUnit = errors.New("the system's manager has no such unit")

// unit is what the manager says of one.
type unit struct {
	id, fragment, invocation string
	dropIns                  []string
	transient, stale         bool // stale: its files changed after they were loaded
	cgroup                   string
	// The rest is of services alone.
	user    string
	dynamic bool
	mainPID uint32
}

// bus is the connection to the system's D-Bus, made when it is first needed and again after it broke.
type bus struct {
	address string

	turn chan struct{} // holds one when conn is in use; a mutex whose wait obeys a context
	conn *dbus.Conn    // nil: none
}

func newBus(address string) *bus { return &bus{address: address, turn: make(chan struct{}, 1)} }

func (b *bus) lock(ctx context.Context) error {
	select {
	case b.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// dial connects, says hello, and refuses what hangs.
func dial(ctx context.Context, address string) (*dbus.Conn, error) {
	var conn *dbus.Conn
	var err error
	// The context of a connection is its life, so a dial that takes too long is ended from beside.
	if address == "" {
		conn, err = dbus.SystemBusPrivate()
	} else {
		conn, err = dbus.Dial(address)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to the system's D-Bus: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err = conn.Auth(nil); err == nil {
		err = conn.Hello()
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("greet the system's D-Bus: %w", err)
	}
	return conn, nil
}

// get returns the connection.
func (b *bus) get(ctx context.Context) (*dbus.Conn, error) {
	if err := b.lock(ctx); err != nil {
		return nil, fmt.Errorf("wait for the system's D-Bus: %w", err)
	}
	defer func() { <-b.turn }()
	if b.conn != nil && b.conn.Connected() {
		return b.conn, nil
	}
	conn, err := dial(ctx, b.address)
	if err != nil {
		return nil, err
	}
	b.conn = conn
	return conn, nil
}

// drop gives up a connection that did not answer.
func (b *bus) drop(conn *dbus.Conn) {
	b.turn <- struct{}{}
	defer func() { <-b.turn }()
	if b.conn == conn {
		b.conn = nil
	}
	_ = conn.Close()
}

// unit asks for a unit that is loaded. It never makes the manager load one: the name comes from a
// cgroup path.
func (b *bus) unit(ctx context.Context, name string) (unit, error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	conn, err := b.get(ctx)
	if err != nil {
		return unit{}, err
	}
	u, err := ask(ctx, conn, name)
	if err != nil && !errors.Is(err, errNoUnit) {
		b.drop(conn)
	}
	return u, err
}

func ask(ctx context.Context, conn *dbus.Conn, name string) (unit, error) {
	var at dbus.ObjectPath
	err := conn.Object(service, managerAt).CallWithContext(ctx, service+".Manager.GetUnit", dbus.FlagNoAutoStart, name).Store(&at)
	if refused, ok := errors.AsType[dbus.Error](err); ok && refused.Name == noSuchUnit {
		return unit{}, fmt.Errorf("%w: %s", errNoUnit, name)
	}
	if err != nil {
		return unit{}, fmt.Errorf("ask for unit %s: %w", name, err)
	}
	var u unit
	var invocation []byte
	own := service + "." + kinds[name[strings.LastIndexByte(name, '.')+1:]]
	wanted := []property{
		{service + ".Unit", "Id", &u.id},
		{service + ".Unit", "FragmentPath", &u.fragment},
		{service + ".Unit", "DropInPaths", &u.dropIns},
		{service + ".Unit", "InvocationID", &invocation},
		{service + ".Unit", "Transient", &u.transient},
		{service + ".Unit", "NeedDaemonReload", &u.stale},
		{own, "ControlGroup", &u.cgroup},
	}
	if strings.HasSuffix(name, ".service") {
		wanted = append(wanted, property{own, "User", &u.user}, property{own, "DynamicUser", &u.dynamic}, property{own, "MainPID", &u.mainPID})
	}
	if err := properties(ctx, conn.Object(service, at), wanted); err != nil {
		return unit{}, fmt.Errorf("ask about unit %s: %w", name, err)
	}
	u.invocation = hex.EncodeToString(invocation)
	return u, nil
}

// property is one to ask for and where it goes.
type property struct {
	of, name string
	into     any
}

// properties asks for all at once and waits for all: a service has hundreds, of which ten matter.
func properties(ctx context.Context, object dbus.BusObject, wanted []property) error {
	calls := make([]*dbus.Call, len(wanted))
	for i, p := range wanted {
		calls[i] = object.GoWithContext(ctx, "org.freedesktop.DBus.Properties.Get", dbus.FlagNoAutoStart, make(chan *dbus.Call, 1), p.of, p.name)
	}
	for i, p := range wanted {
		var call *dbus.Call
		select {
		case call = <-calls[i].Done:
		case <-ctx.Done():
			return ctx.Err()
		}
		var value dbus.Variant
		err := call.Store(&value)
		if err == nil {
			err = value.Store(p.into)
		}
		if err != nil {
			return fmt.Errorf("property %s: %w", p.name, err)
		}
	}
	return nil
}
